"""Batch samplers for DataLoader: batches with a chosen dependence between their examples.

The batches of an epoch are a function of the seed and the epoch alone, and iteration can start at any of them, so
that a run resumes in the middle of an epoch: count the batches trained, not those drawn, since the workers of a
DataLoader draw ahead. Without `set_epoch` every pass over a sampler gives the batches of epoch 0 again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Sampler

Order = Literal["shuffle", "class", "split"]


class EpochBatchSampler(Sampler[list[int]]):
    """Batches that are a function of a seed and the epoch.

    Args:
        num_batches: batches in an epoch, at least 1.
        seed: seed of all epochs.

    Raises:
        ValueError: an epoch would have no batch.
    """

    def __init__(self, num_batches: int, seed: int) -> None:
        if num_batches < 1:
            raise ValueError(f"an epoch must have at least 1 batch, got {num_batches}")
        self._num_batches = num_batches
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch that the next pass iterates over, and where it starts.

        Args:
            epoch: number of the epoch, from 0.
            start_batch: number of batches of it to leave out, as they were trained before an interruption.

        Raises:
            ValueError: `start_batch` lies outside the epoch.
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(
                f"start_batch must be between 0 and the {len(self)} batches of an epoch, got {start_batch}"
            )
        self._epoch = epoch
        self._start_batch = start_batch

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        start, self._start_batch = self._start_batch, 0
        return self._batches(self._epoch, start)

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        """Batches of an epoch from number `start`."""

    def _generator(self, *key: int) -> torch.Generator:
        # Hashed, so that neighbouring seeds and epochs give unrelated streams.
        digest = blake2b(repr((self._seed, *key)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


class RandomBatchSampler(EpochBatchSampler):
    """Independent batches: every epoch is a permutation of the examples.

    Args:
        num_examples: examples in the data set.
        batch_size: examples in a batch.
        drop_last: leave out a last batch that is smaller.
        seed: seed of all epochs.

    Raises:
        ValueError: a size is less than 1, or an epoch would have no batch.

    Example:
        >>> [len(batch) for batch in RandomBatchSampler(10, 4, drop_last=False)]
        [4, 4, 2]
    """

    def __init__(self, num_examples: int, batch_size: int, *, drop_last: bool = True, seed: int = 0) -> None:
        _require_positive("batch_size", batch_size)
        _require_positive("num_examples", num_examples)
        super().__init__(num_examples // batch_size if drop_last else -(-num_examples // batch_size), seed)
        self._num_examples = num_examples
        self._batch_size = batch_size

    def _batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        permutation = torch.randperm(self._num_examples, generator=self._generator(epoch))
        for batch in range(start, len(self)):
            yield permutation[batch * self._batch_size : (batch + 1) * self._batch_size].tolist()


class ClassBatchSampler(EpochBatchSampler):
    """Dependent batches: some random classes, and of each of them some random examples.

    P labels x K examples as in metric learning; P1's 16 x 2 and P2's 4 x 32 are drawn with `replacement`.

    The order within a batch decides what contiguous ghost groups see. "shuffle" mixes the classes, "class" leaves
    class after class, and "split" deals the examples of every class over the groups, so that of each pair one
    goes to one group and the other to another (P1, 4.3: 16 x 2 with `examples_per_group=16`).

    Args:
        labels: class of every example, (N,), integers.
        classes_per_batch: P, number of classes drawn for a batch.
        examples_per_class: K, number of different examples drawn for each of them.
        replacement: draw the classes of a batch with replacement.
        order: "shuffle", "class" or "split".
        examples_per_group: size of a ghost group, for "split"; must divide P * K.
        batches_per_epoch: batches in an epoch; by default as many as make up N examples, at least 1.
        seed: seed of all epochs.

    Raises:
        TypeError: the labels are not integers.
        ValueError: a size is out of range, there are too few classes, or a class has too few examples.

    Source:
        Ioffe 2017, section 4.3; Summers & Dinneen 2020, section 4.4.

    Example:
        >>> labels = torch.arange(1_000) // 100
        >>> sampler = ClassBatchSampler(labels, classes_per_batch=4, examples_per_class=8, seed=1)
        >>> batch = next(iter(sampler))
        >>> len(batch), labels[batch].unique().numel()
        (32, 4)
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        classes_per_batch: int,
        examples_per_class: int,
        *,
        replacement: bool = False,
        order: Order = "shuffle",
        examples_per_group: int | None = None,
        batches_per_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        _require_positive("classes_per_batch", classes_per_batch)
        _require_positive("examples_per_class", examples_per_class)
        batch_size = classes_per_batch * examples_per_class
        _check_order(order, examples_per_group, batch_size)
        self._examples_of_class = _examples_of_class(labels, examples_per_class)
        if not replacement and classes_per_batch > len(self._examples_of_class):
            raise ValueError(
                f"classes_per_batch must be at most the {len(self._examples_of_class)} classes there are, "
                f"got {classes_per_batch} without replacement"
            )
        whole_pass = max(1, len(labels) // batch_size)
        super().__init__(whole_pass if batches_per_epoch is None else batches_per_epoch, seed)
        self._classes_per_batch = classes_per_batch
        self._examples_per_class = examples_per_class
        self._replacement = replacement
        self._order: Order = order
        self._num_groups = batch_size // examples_per_group if examples_per_group else 1

    def _batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        for batch in range(start, len(self)):
            yield self._batch(self._generator(epoch, batch))

    def _batch(self, generator: torch.Generator) -> list[int]:
        examples = torch.cat([self._draw(int(label), generator) for label in self._draw_classes(generator)])
        if self._order == "class":
            return examples.tolist()
        groups = examples.view(-1, self._num_groups).T  # dealt like cards: one example to every group in turn
        return torch.cat([_shuffled(group, generator) for group in groups]).tolist()

    def _draw_classes(self, generator: torch.Generator) -> Tensor:
        classes = len(self._examples_of_class)
        if self._replacement:
            return torch.randint(classes, (self._classes_per_batch,), generator=generator)
        return torch.randperm(classes, generator=generator)[: self._classes_per_batch]

    def _draw(self, label: int, generator: torch.Generator) -> Tensor:
        examples = self._examples_of_class[label]
        return examples[torch.randperm(len(examples), generator=generator)[: self._examples_per_class]]


class MicrobatchSampler(Sampler[list[int]]):
    """The batches of another sampler in consecutive pieces, for gradient accumulation over microbatches.

    Args:
        batch_sampler: sampler of whole batches, all of `batch_size` examples.
        batch_size: examples in a whole batch.
        microbatch_size: examples in a piece; must divide `batch_size`.

    Raises:
        ValueError: `microbatch_size` does not divide `batch_size`; while iterating, a batch of another size.

    Source:
        Ioffe 2017, section 4.2.

    Example:
        >>> sampler = MicrobatchSampler(RandomBatchSampler(64, 32), batch_size=32, microbatch_size=4)
        >>> len(sampler), {len(piece) for piece in sampler}
        (16, {4})
    """

    def __init__(self, batch_sampler: EpochBatchSampler, batch_size: int, microbatch_size: int) -> None:
        _require_positive("microbatch_size", microbatch_size)
        if batch_size % microbatch_size:
            raise ValueError(f"microbatch_size must divide batch_size={batch_size}, got {microbatch_size}")
        self._batch_sampler = batch_sampler
        self._batch_size = batch_size
        self._microbatch_size = microbatch_size

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch and the whole batch to start at.

        Args:
            epoch: number of the epoch, from 0.
            start_batch: number of whole batches to leave out.
        """
        self._batch_sampler.set_epoch(epoch, start_batch)

    def __len__(self) -> int:
        return len(self._batch_sampler) * (self._batch_size // self._microbatch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batch_sampler:
            if len(batch) != self._batch_size:
                raise ValueError(f"batch_sampler must yield batches of batch_size={self._batch_size}, got {len(batch)}")
            for start in range(0, len(batch), self._microbatch_size):
                yield batch[start : start + self._microbatch_size]


def _shuffled(examples: Tensor, generator: torch.Generator) -> Tensor:
    return examples[torch.randperm(len(examples), generator=generator)]


def _examples_of_class(labels: Sequence[int] | Tensor, examples_per_class: int) -> tuple[Tensor, ...]:
    labels = torch.as_tensor(labels)
    if labels.dtype.is_floating_point or labels.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.ndim != 1 or labels.numel() == 0:
        raise ValueError(f"labels must have shape (N,) with N of at least 1, got {tuple(labels.shape)}")
    classes, counts = labels.unique(return_counts=True)
    smallest = int(counts.argmin())
    if counts[smallest] < examples_per_class:
        raise ValueError(
            f"examples_per_class must be at most the size of every class, got {examples_per_class}, "
            f"but class {int(classes[smallest])} has {int(counts[smallest])} examples"
        )
    return torch.split(labels.argsort(stable=True), counts.tolist())


def _check_order(order: str, examples_per_group: int | None, batch_size: int) -> None:
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {', '.join(map(repr, get_args(Order)))}, got {order!r}")
    if (order == "split") != (examples_per_group is not None):
        raise ValueError(f"examples_per_group goes with order='split', got {examples_per_group} with order={order!r}")
    if examples_per_group is None:
        return
    _require_positive("examples_per_group", examples_per_group)
    if batch_size % examples_per_group:
        raise ValueError(f"examples_per_group must divide the batch of {batch_size} examples, got {examples_per_group}")


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
