"""What a training forward normalizes by, and whether its batch moves the running statistics.

| forward | normalizes by | its batch moves the statistics |
|---|---|---|
| ordinary | the batch, corrected towards the state | at once |
| in `accumulate` | the same | at the end of the block |
| in `freeze` | the same, or the state itself | never |
| first in a checkpoint | the same, which it leaves with the checkpoint | as without |
| recomputed | what its first forward left | never |
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from . import recomputation
from .moments import Moments
from .ops.problem import RunningState

Statistics = Literal["batch", "running"]


@dataclass(eq=False)
class Accumulation:
    """A block that merges batches.

    Args:
        batches: moments of each, as far as they have come.
    """

    batches: list[Moments] = field(default_factory=list)


@dataclass(eq=False)
class Frozen:
    """A block without updates.

    Args:
        statistics: what to normalize by.
        lasts: whether it has no end but being taken back, and copies are in it too.
    """

    statistics: Statistics
    lasts: bool = False


Blocks = tuple[Accumulation | Frozen, ...]


class Occasion(NamedTuple):
    """How a training forward goes that is not the ordinary one.

    Args:
        state: the running statistics to correct towards, or to normalize by.
        statistics: what to normalize by.
        moves: whether the batch counts for the running statistics.
        in_checkpoint: whether this is the first forward of a checkpoint.
    """

    state: RunningState
    statistics: Statistics
    moves: bool
    in_checkpoint: bool = False


def occasion_of(layer: Hashable, state: RunningState, blocks: Blocks, sees_state: bool) -> Occasion | None:
    """What kind of forward this is.

    Args:
        layer: by which a recomputation knows it.
        state: the layer's buffers.
        blocks: that the layer is in, from the outermost.
        sees_state: whether the output depends on the state even where the batch's statistics normalize.

    Returns:
        None for an ordinary training forward.

    Raises:
        RuntimeError: this is a recomputation whose forward is not known, and the output depends on the state.
    """
    if torch.compiler.is_compiling() or not recomputation.suspected():
        return _in_blocks(state, blocks) if blocks else None
    known: tuple[recomputation.Recording[Occasion], Hashable] | None = recomputation.recomputed()
    if known is None and not recomputation.is_backward():
        occasion = _in_blocks(state, blocks)
        return _recorded(layer, occasion, sees_state) or (occasion if blocks else None)
    seen: Occasion | None = None if known is None else known[0].next(layer, known[1])
    if seen is None and (blocks or not sees_state):
        seen = _in_blocks(state, blocks)  # the state has not moved, or does not matter
    if seen is None:
        raise RuntimeError(
            f"{type(layer).__name__} is called inside a backward pass, but not by a checkpoint (by a tensor's hook, "
            "say), and its running statistics may have moved since the forward: wrap forward and backward of the step "
            "in `with renorm.accumulate(model):`"
        )
    occasion = seen._replace(moves=False, in_checkpoint=False)
    _recorded(layer, occasion, sees_state)  # checkpoints inside the checkpoint start anew
    return occasion


def counts(blocks: Blocks) -> bool:
    """Whether batches in these blocks count for the running statistics.

    Args:
        blocks: from the outermost.

    Returns:
        False in a frozen one.
    """
    return not any(isinstance(block, Frozen) for block in blocks)


def innermost_accumulation(blocks: Blocks) -> Accumulation | None:
    """The block that merges what comes next.

    Args:
        blocks: from the outermost.

    Returns:
        None if updates are made at once.
    """
    for block in reversed(blocks):  # not next(), which the compiler of torch 2.8 cannot follow
        if isinstance(block, Accumulation):
            return block
    return None


def _in_blocks(state: RunningState, blocks: Blocks) -> Occasion:
    for block in reversed(blocks):
        if isinstance(block, Frozen):
            return Occasion(state, block.statistics, moves=False)
    return Occasion(state, "batch", moves=True)


def _recorded(layer: Hashable, occasion: Occasion, sees_state: bool) -> Occasion | None:
    """Leave with the checkpoints around what this forward sees; None outside of checkpoints."""
    regions = recomputation.regions()
    if not regions:
        return None
    seen = occasion
    if sees_state or occasion.statistics == "running":
        seen = occasion._replace(state=RunningState(*(tensor.clone() for tensor in occasion.state)))
    for region in regions:
        region.add(layer, seen)
    return occasion._replace(in_checkpoint=True)
