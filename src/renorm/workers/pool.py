"""Running statistics merged over workers: one collective a step for all layers, while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Variable

from ..moments import Moments
from ..recomputation import is_backward
from ..transforms import unwatched
from .group import Workers
from .sums import Summed, from_sums, to_sums


class Member(Protocol):
    """What a pool knows of a layer."""

    running_var: Tensor
    serial: int  # equal on all workers, where layers are constructed in the same order

    @property
    def summed(self) -> Summed:
        """Which sums it needs."""

    def merging_pool(self) -> Pool | None:
        """Where it leaves its moments."""

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


# --- in compiled code ------------------------------------------------------------------------------------------------
# Graphs call the pool by operations that the compiler does not look into. What it believes to be written it neither
# drops nor moves, so each of them claims to write to a tensor: the forward's to one of no meaning, the backward's to
# the gradient that passes by. Layers are known to them by a ticket, a tensor, for layers of one kind to share a graph.

_tickets = count()
_layers: WeakValueDictionary[int, Member] = WeakValueDictionary()
_UNSEEN = (torch.Tag.cudagraph_unsafe,)  # Python that a replayed CUDA graph would pass over

with unwatched():
    _written = torch.zeros((), device="cpu")


def ticket_for(member: Member) -> Tensor:
    """By which compiled code knows a layer, or a copy of it.

    Args:
        member: the layer.

    Returns:
        A number, 0-d int64 on the CPU.
    """
    number = next(_tickets)
    _layers[number] = member
    with unwatched():
        return torch.tensor(number, device="cpu")


def leave(ticket: Tensor, batches: Iterable[Moments]) -> None:
    """Keep a layer's batches until the backward pass that comes, in compiled code.

    Args:
        ticket: of the layer.
        batches: moments of each batch.
    """
    _leave(_written, ticket, [torch.cat(moments, 1) for moments in batches])


def merge_in_backward_of(y: Tensor, ticket: Tensor) -> Tensor:
    """Have the gradient of an output start the collective, in compiled code.

    Args:
        y: output of a layer.
        ticket: of the layer.

    Returns:
        The output.
    """
    merged: Tensor = _MergeInBackward.apply(y, ticket)
    return merged


@torch.library.custom_op("renorm::leave", mutates_args=("written",), tags=_UNSEEN)
def _leave(written: Tensor, ticket: Tensor, batches: list[Tensor]) -> None:
    member = _layers[int(ticket)]
    pool = member.merging_pool()
    if pool is None or is_backward():  # a checkpoint's recomputation
        return
    channels = member.running_var.shape[0]
    # copies, since the memory is the graph's
    pool.add(member, [Moments(*batch.clone().split([channels, channels, 1], 1)) for batch in batches])
    pool.expect_backward()


@torch.library.custom_op("renorm::merge_in_backward", mutates_args=("gradient",), tags=_UNSEEN)
def _merge_in_backward(gradient: Tensor, ticket: Tensor) -> None:
    member = _layers.get(int(ticket))  # may be gone before its output
    pool = None if member is None else member.merging_pool()
    if pool is not None:
        pool.merge_in_backward(gradient)


@_leave.register_fake
def _(written: Tensor, ticket: Tensor, batches: list[Tensor]) -> None:
    return None


@_merge_in_backward.register_fake
def _(gradient: Tensor, ticket: Tensor) -> None:
    return None


class _MergeInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ticket: Tensor) -> Tensor:
        ctx.save_for_backward(ticket)
        return y.detach()  # not a view, for what comes next may be in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _merge_in_backward(gradient, *ctx.saved_tensors)
        return gradient, None
