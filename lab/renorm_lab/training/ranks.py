"""Lightning Fabric for one process, and for the ranks that torchrun starts; how ranks share a minibatch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import renorm

from ..errors import LabError
from ..runs import Precision, Run

if TYPE_CHECKING:
    from lightning.fabric import Fabric

# Without the broadcast of rank 0's buffers before each forward, which has another name from torch 2.13 on.
_PARAMETERS = signature(DistributedDataParallel).parameters
_NO_BROADCAST: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers": False
}


def make_fabric(device: str, precision: Precision = "32-true") -> Fabric:
    """What moves models to the device, casts, averages gradients over ranks, and says which of them this is.

    Args:
        device: where to train, such as cpu or cuda; under torchrun every rank takes a device of this type.
        precision: of the computation.

    Returns:
        Fabric; under torchrun this process has joined the others.

    Raises:
        LabError: the device cannot be used.
    """
    from lightning.fabric import Fabric  # here, since it takes seconds
    from lightning.fabric.strategies.ddp import DDPStrategy

    try:
        torch.empty(0, device=device)
        target = torch.device(device)
        if not distributed.is_torchelastic_launched():
            devices = 1 if target.index is None or target.type == "cpu" else [target.index]
            return Fabric(accelerator=target.type, devices=devices, precision=precision)
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        fabric = Fabric(
            accelerator=target.type,
            strategy=DDPStrategy(**_NO_BROADCAST),  # renorm.synchronize merges the running statistics
            devices=local,
            num_nodes=int(os.environ["WORLD_SIZE"]) // local,
            precision=precision,
        )
    except (RuntimeError, AssertionError, ValueError) as error:
        raise LabError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None
    fabric.launch()
    return fabric


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

    def of(self, batch: torch.Tensor, rank: int) -> torch.Tensor:
        """The examples of a rank.

        Args:
            batch: (N, ...), the same on all ranks.
            rank: its number.

        Returns:
            (examples, ...).
        """
        return batch.narrow(0, rank * self.examples, self.examples)


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
