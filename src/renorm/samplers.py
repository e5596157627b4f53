"""Batch samplers for DataLoader: batches with a chosen dependence between their examples.

The batches of an epoch are a function of the seed and the epoch alone, and a run resumes at any of them: count the
batches trained, not those drawn, since the workers of a DataLoader draw ahead. Without `set_epoch` every pass gives
epoch 0 again, as with torch's DistributedSampler.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from hashlib import blake2b
from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Sampler

Order = Literal["shuffle", "class", "split"]


class _EpochBatchSampler(Sampler[list[int]]):
    """Batches that are a function of a seed and the epoch; only the last of an epoch may be smaller."""

    def __init__(self, batch_size: int, examples_per_epoch: int, seed: int) -> None:
        self.batch_size = batch_size
        self.examples_per_epoch = examples_per_epoch
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate over, and where the next pass starts; passes after that one are whole.

        Args:
            epoch: number of the epoch.
            start_batch: number of batches to leave out, as they were trained before an interruption.

        Raises:
            ValueError: `start_batch` lies outside the epoch.
        """
        if start_batch not in range(len(self) + 1):
            raise ValueError(f"start_batch must be from 0 to the {len(self)} batches of an epoch, got {start_batch}")
        self._epoch = epoch
        self._start_batch = start_batch

    def __len__(self) -> int:
        return ceil(self.examples_per_epoch / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        start, self._start_batch = self._start_batch, 0
        return self._batches(self._epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        raise NotImplementedError

    def _generator(self, *key: int) -> torch.Generator:
        # Hashed, since with seed + epoch the runs of neighbouring seeds would share their epochs.
        digest = blake2b(repr((self._seed, *key)).encode(), digest_size=8).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))


class RandomBatchSampler(_EpochBatchSampler):
    """Independent batches: every epoch is a permutation of the examples.

    Args:
        num_examples: examples in the data set.
        batch_size: examples in a batch.
        drop_last: leave out a last batch that is smaller.
        seed: seed of all epochs.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1, or an epoch would have no batch.

    Example:
        >>> [len(batch) for batch in RandomBatchSampler(10, 4, drop_last=False)]
        [4, 4, 2]
    """

    def __init__(self, num_examples: int, batch_size: int, *, drop_last: bool = True, seed: int = 0) -> None:
        _require_size("batch_size", batch_size)
        _require_size("num_examples", num_examples, at_least=batch_size if drop_last else 1)
        super().__init__(batch_size, num_examples - num_examples % batch_size if drop_last else num_examples, seed)
        self._num_examples = num_examples

    def _batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        permutation = torch.randperm(self._num_examples, generator=self._generator(epoch), device="cpu")
        for first in range(start * self.batch_size, self.examples_per_epoch, self.batch_size):
            yield permutation[first : first + self.batch_size].tolist()


class ClassBatchSampler(_EpochBatchSampler):
    """Dependent batches: P random classes, and K random examples of each.

    Args:
        labels: class of every example, (N,), integers.
        classes_per_batch: P, classes drawn for a batch, each as likely as any other whatever its size.
        examples_per_class: K, different examples drawn for each of them.
        replacement: draw the classes of a batch with replacement.
        order: what contiguous ghost groups see. "shuffle" mixes the classes, "class" leaves class after class, and
            "split" deals the examples of every class over the groups, so that a pair lands in two of them.
        examples_per_group: consecutive examples in a ghost group, for "split"; must divide P * K.
        batches_per_epoch: batches in an epoch; by default as many as N examples fill, at least 1.
        seed: seed of all epochs.

    Raises:
        TypeError: the labels or a size are not integers.
        ValueError: a size or the order is not accepted, or there are too few classes or examples of a class.

    Source:
        Ioffe 2017, section 4.3: 16 x 2 with replacement, its pairs split with `examples_per_group=16`;
        Summers & Dinneen 2020, section 4.4: 4 x 32 with replacement.

    Example:
        >>> labels = torch.arange(1_000) // 100
        >>> {labels[batch].unique().numel() for batch in ClassBatchSampler(labels, 4, 8)}
        {4}
    """

    def __init__(
        self,
        labels: Collection[int] | Tensor,
        classes_per_batch: int,
        examples_per_class: int,
        *,
        replacement: bool = False,
        order: Order = "shuffle",
        examples_per_group: int | None = None,
        batches_per_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        _require_size("classes_per_batch", classes_per_batch)
        _require_size("examples_per_class", examples_per_class)
        self._examples_of_class = _examples_of_class(labels, examples_per_class)
        most = len(self._examples_of_class)
        if not replacement and classes_per_batch > most:
            raise ValueError(f"classes_per_batch must be at most {most} without replacement, got {classes_per_batch}")
        batch_size = classes_per_batch * examples_per_class
        num_batches = max(1, len(labels) // batch_size) if batches_per_epoch is None else batches_per_epoch
        _require_size("batches_per_epoch", num_batches)
        super().__init__(batch_size, num_batches * batch_size, seed)
        self._classes_per_batch = classes_per_batch
        self._examples_per_class = examples_per_class
        self._replacement = replacement
        self._order = order
        self._num_groups = _num_groups(order, examples_per_group, batch_size)

    def _batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        for batch in range(start, len(self)):
            yield self._batch(self._generator(epoch, batch))

    def _batch(self, generator: torch.Generator) -> list[int]:
        drawn = [self._examples_of_class[label] for label in self._draw_classes(generator)]
        examples = torch.cat([of[_sample(len(of), self._examples_per_class, generator)] for of in drawn])
        if self._order == "class":
            return examples.tolist()
        groups = examples.view(-1, self._num_groups).T  # dealt like cards: one example to every group in turn
        mixed = [group[torch.randperm(len(group), generator=generator, device="cpu")] for group in groups]
        return torch.cat(mixed).tolist()

    def _draw_classes(self, generator: torch.Generator) -> list[int]:
        classes = len(self._examples_of_class)
        if self._replacement:
            return torch.randint(classes, (self._classes_per_batch,), generator=generator, device="cpu").tolist()
        return _sample(classes, self._classes_per_batch, generator)


class MicrobatchSampler(Sampler[list[int]]):
    """The batches of another sampler in consecutive pieces: statistics over a piece, gradients over a batch.

    Args:
        batch_sampler: sampler of whole batches; `set_epoch` is its own, and counts whole batches.
        microbatch_size: examples in a piece; the last piece of a batch holds what is left over.

    Raises:
        TypeError: `batch_sampler` is not one of the above, or `microbatch_size` not an integer.
        ValueError: `microbatch_size` is less than 1.

    Source:
        Ioffe 2017, section 4.2.

    Example:
        >>> [len(piece) for piece in MicrobatchSampler(RandomBatchSampler(20, 10), microbatch_size=4)]
        [4, 4, 2, 4, 4, 2]
    """

    def __init__(self, batch_sampler: RandomBatchSampler | ClassBatchSampler, microbatch_size: int) -> None:
        if not isinstance(batch_sampler, RandomBatchSampler | ClassBatchSampler):
            raise TypeError(f"batch_sampler must be a RandomBatchSampler or ClassBatchSampler, got {batch_sampler!r}")
        _require_size("microbatch_size", microbatch_size)
        self._batch_sampler = batch_sampler
        self._microbatch_size = microbatch_size
        self.set_epoch = batch_sampler.set_epoch

    def __len__(self) -> int:
        whole, rest = divmod(self._batch_sampler.examples_per_epoch, self._batch_sampler.batch_size)
        pieces_per_batch = ceil(self._batch_sampler.batch_size / self._microbatch_size)
        return whole * pieces_per_batch + ceil(rest / self._microbatch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batch_sampler:
            yield from (batch[i : i + self._microbatch_size] for i in range(0, len(batch), self._microbatch_size))


def _sample(population: int, size: int, generator: torch.Generator) -> list[int]:
    # Fisher-Yates that stores only what it moved: a permutation of a whole class would take milliseconds.
    moved: dict[int, int] = {}
    drawn = []
    uniforms = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
    for step, uniform in enumerate(uniforms.tolist(), start=1):
        last = population - step
        pick = int(uniform * (last + 1))
        drawn.append(moved.get(pick, pick))
        moved[pick] = moved.get(last, last)
    return drawn


def _examples_of_class(labels: Collection[int] | Tensor, examples_per_class: int) -> tuple[Tensor, ...]:
    try:
        # Arrays are copied, since PyTorch warns when it shares the memory of a read-only one.
        tensor = labels.cpu() if isinstance(labels, Tensor) else torch.tensor(labels, device="cpu")
        torch.iinfo(tensor.dtype)  # raises unless these are integers
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels must be integers of shape (N,), got {labels!r:.80}") from error
    if tensor.ndim != 1 or not len(tensor):
        raise ValueError(f"labels must have shape (N,) with N of at least 1, got {tuple(tensor.shape)}")
    ordered, examples = tensor.sort(stable=True)
    classes, counts = ordered.unique_consecutive(return_counts=True)
    count, smallest = counts.min(dim=0)
    if count < examples_per_class:
        raise ValueError(f"class {classes[smallest]} has {count} examples, got examples_per_class={examples_per_class}")
    return torch.split(examples, counts.tolist())


def _num_groups(order: str, examples_per_group: int | None, batch_size: int) -> int:
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {', '.join(map(repr, get_args(Order)))}, got {order!r}")
    if (order == "split") != (examples_per_group is not None):
        raise ValueError(f"examples_per_group goes with order='split', got {examples_per_group} with order={order!r}")
    group_size = batch_size if examples_per_group is None else examples_per_group
    _require_size("examples_per_group", group_size)
    if batch_size % group_size:
        raise ValueError(f"examples_per_group must divide the batch of {batch_size} examples, got {group_size}")
    return batch_size // group_size


def _require_size(name: str, value: int, at_least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
