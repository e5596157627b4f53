"""The processes that share statistics."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch
from torch import Tensor
from torch import distributed as dist

# A process group of ours for each of the user's, so that no collective of ours meets one of DDP's out of turn. Held by
# torch alone: what outlives destroy_process_group may abort the process at its end.
_own: WeakKeyDictionary[Any, ref[Any]] = WeakKeyDictionary()
_named: WeakValueDictionary[str, Any] = WeakValueDictionary()  # the user's


LOST = "lost"  # the group of what was pickled: it is known to its own process only


class Workers:
    """A process group, or all processes. Copies of a layer keep it; what is pickled has lost all but the latter.

    Args:
        group: of torch.distributed; None for all processes.
    """

    def __init__(self, group: Any | None = None) -> None:
        self.group = group
        # by which the compiler may ask for the group, which it does not hand on as it is
        self.group_name: str | None = getattr(group, "group_name", None)
        if self.group_name is not None:
            _named[self.group_name] = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Workers:
        return self

    def __reduce__(self) -> tuple[type[Workers], tuple[str | None]]:
        return Workers, (None if self.group is None else LOST,)

    @property
    def number(self) -> int:
        """How many there are, 1 as long as torch.distributed is not initialized."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        if self.group == LOST:
            raise RuntimeError(
                "this layer was synchronized within a process group, which no file can keep: call "
                "renorm.synchronize(model, ...) again"
            )
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process's place among them."""
        return dist.get_rank(self.group)

    @property
    def process_group(self) -> Any:
        """The user's process group."""
        return self.group or dist.group.WORLD

    @property
    def own(self) -> Any:
        """A process group of the same processes and time limit that nothing else uses; made by all at first use."""
        return _own_of(self.group)

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensor of every worker.

        Args:
            tensor: any shape, the same on all workers.

        Returns:
            All of them, (workers, ...).
        """
        if torch.compiler.is_compiling():
            ops = torch.ops._c10d_functional
            parts = ops.all_gather_into_tensor(tensor[None].contiguous(), self.number, _name_of_own(self.group_name))
            compiled: Tensor = ops.wait_tensor(parts)
            return compiled
        gathered = tensor.new_empty((self.number, *tensor.shape))
        dist.all_gather(list(gathered.unbind()), tensor.contiguous(), group=self.own)
        return gathered

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers.

        Args:
            tensor: any shape, the same on all workers; not to be used any more.

        Returns:
            The sum.
        """
        if torch.compiler.is_compiling():
            ops = torch.ops._c10d_functional
            compiled: Tensor = ops.wait_tensor(ops.all_reduce(tensor, "sum", _name_of_own(self.group_name)))
            return compiled
        dist.all_reduce(tensor, group=self.own)
        return tensor

    def start_sum(self, tensor: Tensor) -> Any:
        """Begin a sum over workers, in place.

        Args:
            tensor: any shape, the same on all workers.

        Returns:
            What to wait for.
        """
        return dist.all_reduce(tensor, group=self.own, async_op=True)


def _own_of(group: Any | None) -> Any:
    group = group or dist.group.WORLD
    own = _own[group]() if group in _own else None
    if own is None:
        ranks = dist.get_process_group_ranks(group)
        own = dist.new_group(ranks, timeout=_time_limit(group), use_local_synchronization=True)
        _own[group] = ref(own)
    return own


def _name_of_own(group_name: str | None) -> str:
    name: str = _own_of(None if group_name is None else _named[group_name]).group_name
    return name


# The compiler calls it and keeps the name, for a process group is made outside of graphs; as by
# torch.compiler.assume_constant_result, which imports the compiler.
_name_of_own._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _time_limit(group: Any) -> timedelta:
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    limit: timedelta = group._get_backend(device).options._timeout
    return limit
