"""The minibatches of a run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from renorm.samplers import ClassBatchSampler, RandomBatchSampler

from ..data import Dataset, Part
from ..data.augmentation import crop_and_flip
from ..data.image_files import ImageFiles
from ..runs import Run


class ParallelBatchSampler:
    """Minibatches that are drawn independently of each other and put together to one, as if several workers drew them.

    Args:
        batch_sampler: of one worker's minibatches.
        workers: number of minibatches that make one.
    """

    def __init__(self, batch_sampler: ClassBatchSampler, workers: int) -> None:
        self._batch_sampler = batch_sampler
        self._workers = workers
        self.set_epoch(0)

    def __len__(self) -> int:
        return max(1, len(self._batch_sampler) // self._workers)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate over, and where the next pass starts; see `renorm.samplers`."""
        self._epoch, self._start_batch = epoch, start_batch

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self._start_batch, len(self)):
            self._batch_sampler.set_epoch(self._epoch * len(self) + batch)  # its first batches are new ones
            yield [index for part in islice(self._batch_sampler, self._workers) for index in part]


BatchSampler = RandomBatchSampler | ClassBatchSampler | ParallelBatchSampler


def batch_sampler(run: Run, train: Part) -> BatchSampler:
    """The sampler of a run's regime.

    Args:
        run: the run.
        train: training part.

    Returns:
        Independent minibatches, or minibatches of few classes.

    Raises:
        ValueError: there are too few classes, or too few examples of one.
    """
    if run.classes_per_batch is None or run.examples_per_class is None:
        return RandomBatchSampler(len(train), run.batch_size, seed=run.seed)
    workers = run.batch_size // (run.classes_per_batch * run.examples_per_class)
    sampler = ClassBatchSampler(
        train.labels.cpu(),
        run.classes_per_batch,
        run.examples_per_class,
        replacement=run.replacement,
        order=run.order,
        examples_per_group=run.examples_per_group if run.order == "split" else None,
        batches_per_epoch=max(workers, len(train) // (run.classes_per_batch * run.examples_per_class)),
        seed=run.seed,
    )
    return sampler if workers == 1 else ParallelBatchSampler(sampler, workers)


def batches(run: Run, dataset: Dataset, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The minibatches of a training.

    Args:
        run: the run.
        dataset: the data.
        start: steps that were trained before.

    Yields:
        Standardized images, (N, C, H, W), and labels, (N,); as often as the run has steps left. Augmentation draws
        from torch's random numbers of the CPU.
    """
    indices = islice(_indices(batch_sampler(run, dataset.train), start), run.steps - start)
    for images, labels in _draw(run, dataset.train, indices, start):
        yield dataset.standardize(images), labels


def _indices(sampler: BatchSampler, start: int) -> Iterator[list[int]]:
    epoch, first = divmod(start, len(sampler))
    while True:
        sampler.set_epoch(epoch, first)
        yield from sampler
        epoch, first = epoch + 1, 0


def _draw(run: Run, train: Part, indices: Iterator[list[int]], start: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(train.images, ImageFiles):
        yield from _decode(run, train.images, train.labels, indices, start)
        return
    for batch in indices:
        images = train.take(batch)
        yield crop_and_flip(images) if run.augment else images, train.labels[batch]


def _decode(
    run: Run, files: ImageFiles, labels: Tensor, indices: Iterator[list[int]], start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    # The decoders draw other random numbers for each seed, and after an interruption, and none of torch's own.
    seed = int(np.random.SeedSequence((run.seed, start)).generate_state(1)[0])  # torch would take the low 32 bits alone
    loader = DataLoader(
        _Decoded(files, labels.cpu(), run.augment),
        batch_sampler=indices,
        num_workers=_decoders(labels.device),
        pin_memory=labels.device.type != "cpu",
        generator=torch.Generator().manual_seed(seed),
    )
    for images, targets in loader:
        yield images.to(labels.device, non_blocking=True), targets.to(labels.device, non_blocking=True)


def _decoders(device: torch.device) -> int:
    """Processes that read image files beside the training."""
    return 0 if device.type == "cpu" else 8


class _Decoded(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, files: ImageFiles, labels: Tensor, augment: bool) -> None:
        self._files, self._labels, self._augment = files, labels, augment

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._files.image(index, self._augment), self._labels[index]
