"""Running statistics merged over workers: one collective a step for all layers, while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import Variable

from ..moments import Moments
from .group import Workers
from .sums import Summed, from_sums, to_sums


class Member(Protocol):
    """What a pool knows of a layer."""

    running_var: Tensor
    serial: int  # equal on all workers, where layers are constructed in the same order

    @property
    def summed(self) -> Summed:
        """Which sums it needs."""

    def commit_merged(self, moments: Moments, left_out: Tensor) -> None:
        """Move the running statistics by the moments of all workers."""


class Pool:
    """Layers that merge their running statistics over workers together.

    A forward leaves the layer's moments here. The first gradient of the backward pass that arrives at a layer starts
    the collective, and the end of the backward pass waits for it and moves the statistics.

    Args:
        workers: processes to merge over.
        members: the layers, so that those without a batch on this worker send zeros. None for the layers that have
            one, which must then be the same on all workers.
    """

    announce: Callable[[], object] | None = None  # that a collective will come, where workers may run out of batches

    def __init__(self, workers: Workers, members: Sequence[Member] | None = None) -> None:
        self.workers = workers
        self._members = None if members is None else list(members)
        self._pending: WeakKeyDictionary[Member, list[Moments]] = WeakKeyDictionary()
        self._backward_comes = False
        self._under_way: tuple[Sequence[Member], Tensor, Any] | None = None

    def add(self, member: Member, batches: Iterable[Moments]) -> None:
        """Keep a layer's batches until the next collective.

        Args:
            member: the layer.
            batches: moments of each batch.
        """
        if member in self._pending and not self._backward_comes:
            self.merge()  # of forwards without gradients
        if self.announce is not None and not self._pending:
            self.announce()
        self._pending.setdefault(member, []).extend(batches)

    def register(self, member: Member) -> None:
        """Take in a copy of a layer.

        Args:
            member: the copy.
        """
        if self._members is not None:
            self._members.append(member)

    def expect_backward(self) -> None:
        """What is pending will be merged by a backward pass."""
        self._backward_comes = len(self._pending) > 0

    def merge_in_backward(self, gradient: Tensor) -> None:
        """A gradient's hook: start the collective, and move the statistics when the backward pass ends.

        Args:
            gradient: not used.
        """
        if not self._pending:
            return
        self._start(self._all())
        Variable._execution_engine.queue_callback(self._finish)

    def merge(self, members: Sequence[Member] | None = None) -> None:
        """Merge at once.

        Args:
            members: some of the layers; None for all.
        """
        if self._pending:
            self._start(members or self._all())
            self._finish()

    def take_part_with_nothing(self) -> None:
        """The collective of a worker without a batch."""
        self._start(self._all())
        self._finish()

    @property
    def device(self) -> torch.device:
        """Of the first member's statistics."""
        return self._all()[0].running_var.device

    def _all(self) -> Sequence[Member]:
        return sorted(self._pending, key=lambda member: member.serial) if self._members is None else self._members

    def _start(self, members: Sequence[Member]) -> None:
        self._finish()  # what a backward pass that failed has left
        batches = [self._pending.pop(member, []) for member in members]
        self._backward_comes = False
        buffer = to_sums([member.summed for member in members], batches, members[0].running_var.device)
        self._under_way = members, buffer, self.workers.start_sum(buffer)

    def _finish(self) -> None:
        if self._under_way is None:
            return
        (members, buffer, work), self._under_way = self._under_way, None
        work.wait()
        found = from_sums(buffer, [member.summed for member in members], [member.running_var for member in members])
        for member, moments, left_out in zip(members, *found, strict=True):
            member.commit_merged(moments, left_out)

    def __reduce__(self) -> tuple[type[Pool], tuple[Workers, list[Member] | None]]:
        return Pool, (self.workers, None if self._members is None else [])  # copies of layers register again


_pools: WeakKeyDictionary[Any, Pool] = WeakKeyDictionary()


def pool_of(workers: Workers) -> Pool:
    """The pool of layers that belong to no model's.

    Args:
        workers: processes to merge over.

    Returns:
        The same for the same process group.
    """
    group = workers.process_group
    if group not in _pools:
        _pools[group] = Pool(workers)
    return _pools[group]
