"""The minibatches of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice

import torch
from torch import Tensor

from renorm.samplers import ClassBatchSampler, RandomBatchSampler

from .data import Dataset, Part
from .runs import Run

_CROP_PADDING = 4  # pixels, as usual for images of 32 x 32


def batch_sampler(run: Run, train: Part) -> RandomBatchSampler | ClassBatchSampler:
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
    return ClassBatchSampler(train.labels.cpu(), run.classes_per_batch, run.examples_per_class, seed=run.seed)


def batches(run: Run, dataset: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    """All minibatches of a training.

    Args:
        run: the run.
        dataset: the data.

    Yields:
        Standardized images, (N, C, H, W), and labels, (N,); as often as the run has steps.
    """
    sampler = batch_sampler(run, dataset.train)
    augment = _augmentation(dataset.image_shape) if run.augment else None
    for indices in islice(_indices(sampler), run.steps):
        images = dataset.train.images[indices]
        if augment is not None:
            images = torch.stack([augment(image) for image in images])  # each image has its own crop
        yield dataset.standardize(images), dataset.train.labels[indices]


def _indices(sampler: RandomBatchSampler | ClassBatchSampler) -> Iterator[list[int]]:
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from sampler


def _augmentation(image_shape: tuple[int, int, int]) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    crop = v2.RandomCrop(image_shape[1:], padding=_CROP_PADDING)
    augment: Callable[[Tensor], Tensor] = v2.Compose([crop, v2.RandomHorizontalFlip()])
    return augment
