"""Lightning Fabric for one process, and for the ranks that torchrun starts; how ranks share a minibatch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import renorm

from ..errors import LabError
from ..runs import Precision, Run

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Value = TypeVar("Value")
# Without the broadcast of rank 0's buffers before each forward, which has another name from torch 2.13 on.
_PARAMETERS = signature(DistributedDataParallel).parameters
_NO_BROADCAST: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers": False
}


def make_fabric(device: str, precision: Precision = "32-true") -> Fabric:
    """What moves models to the device, casts, and averages gradients over ranks.

    Args:
        device: where to train, such as cpu or cuda; under torchrun every rank takes a device of this type.
        precision: of the computation.

    Returns:
        Fabric; under torchrun this process has joined the others.
    """
    from lightning.fabric import Fabric  # here, since it takes seconds
    from lightning.fabric.strategies.ddp import DDPStrategy

    target = torch.device(device)
    if not distributed.is_torchelastic_launched():
        devices = 1 if target.index is None else [target.index]
        return Fabric(accelerator=target.type, devices=devices, precision=precision)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = Fabric(
        accelerator=target.type,
        strategy=DDPStrategy(**_NO_BROADCAST),  # renorm.synchronize merges the running statistics
        devices=local,
        num_nodes=int(os.environ["WORLD_SIZE"]) // local,
        precision=precision,
    )
    fabric.launch()
    return fabric


def join(device: str) -> None:
    """Join the other ranks, if torchrun started this process.

    Args:
        device: where to train.
    """
    if distributed.is_torchelastic_launched():
        make_fabric(device)


def device(name: str) -> str:
    """The device of this rank.

    Args:
        name: where to train, such as cpu or cuda.

    Returns:
        The same but for GPUs under torchrun, of which each rank has its own.
    """
    if number() == 1 or name == "cpu":
        return name
    return f"{torch.device(name).type}:{os.environ['LOCAL_RANK']}"


@contextmanager
def first_one_first() -> Iterator[None]:
    """A block that rank 0 goes through before the others do."""
    if rank() > 0:
        distributed.barrier()
    yield
    if rank() == 0 and number() > 1:
        distributed.barrier()


def number() -> int:
    """Processes that train together: 1 but for torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process among them; 0 alone writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def from_first(value: Value) -> Value:
    """The value that rank 0 has.

    Args:
        value: of this rank; only rank 0's matters.

    Returns:
        Rank 0's, on all of them.
    """
    if number() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


@dataclass(frozen=True)
class Share:
    """What a rank does of a minibatch, so that the result of all ranks is that of one process.

    Args:
        examples: consecutive examples of the minibatch.
        forward_size: examples in a forward.
        examples_per_group: of the layers.
        sync: as of `renorm.synchronize`.
        ranks_per_group: as of `renorm.synchronize`.
    """

    examples: int
    forward_size: int
    examples_per_group: int | None
    sync: Literal["running", "batch"] | None = None
    ranks_per_group: int | None = None

    def layers_of(self, run: Run) -> Run:
        """The run with the grouping that layers have on a rank.

        Args:
            run: the run.

        Returns:
            The run to make layers for.
        """
        return replace(run, examples_per_group=self.examples_per_group)

    def synchronize(self, model: nn.Module) -> None:
        """Say for a model's layers what they have in common with those of other ranks, in place.

        Args:
            model: not yet given to Fabric.
        """
        if self.sync is not None:
            renorm.synchronize(model, self.sync, ranks_per_group=self.ranks_per_group)

    def of(self, batch: torch.Tensor) -> torch.Tensor:
        """The examples of this rank.

        Args:
            batch: (N, ...), the same on all ranks.

        Returns:
            (examples, ...).
        """
        return batch.narrow(0, rank() * self.examples, self.examples)


def share_of(run: Run, ranks: int) -> Share:
    """Divide the minibatches of a run.

    Args:
        run: the run.
        ranks: processes that train together.

    Returns:
        The share of each.

    Raises:
        LabError: the mathematics does not say how: statistics would be over other examples than in one process.
    """
    forward = run.forward_size or run.batch_size
    if ranks == 1:
        return Share(run.batch_size, forward, run.examples_per_group)
    if run.objective == "metric":
        raise LabError(f"{run}: metric learning compares all examples of a minibatch, which ranks cannot share")
    group = min(run.examples_per_group or forward, forward)
    examples, rest = divmod(run.batch_size, ranks)
    if rest:
        raise LabError(f"{run}: {ranks} ranks cannot share a minibatch of {run.batch_size} examples evenly")
    if examples % forward == 0:
        return Share(examples, forward, run.examples_per_group, "running")
    if forward % examples == 0 and examples % group == 0:
        return Share(examples, examples, group, "running")
    if group % examples == 0 and forward % group == 0 and run.batch_size % forward == 0:
        together = group // examples
        return Share(examples, examples, None, "batch", None if together == ranks else together)
    raise LabError(
        f"{run}: {ranks} ranks with {examples} examples each cannot normalize over {group} examples as one process "
        "does; choose a number of ranks such that one of the two divides the other"
    )
