"""The methods that are compared: settings of the one normalization layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import renorm

from .runs import Run

MethodName = Literal["batch_norm", "batch_renorm", "ghost_batch_norm", "batch_group_norm", "batch_group_renorm"]


@dataclass(frozen=True)
class Method:
    """A normalization method: its grouping of channels, its tracking rule, and whether it corrects.

    Args:
        label: name in tables and plots.
        tracking: rule by which the running variance moves, the default of the named layer.
        limits: whether batch renorm's correction applies.
        channels_per_group: channels that share statistics.
    """

    label: str
    tracking: str
    limits: bool = False
    channels_per_group: int = 1


METHODS: dict[MethodName, Method] = {
    "batch_norm": Method("batch norm", "var"),
    "batch_renorm": Method("batch renorm", "std", limits=True),
    "ghost_batch_norm": Method("ghost batch norm", "total"),
    "batch_group_norm": Method("batch-group norm", "total", channels_per_group=8),
    "batch_group_renorm": Method("batch-group norm + limits", "total", limits=True, channels_per_group=8),
}


def norm_factory(run: Run) -> Callable[[int], renorm.Norm]:
    """What makes the normalization layers of a run.

    Args:
        run: the run.

    Returns:
        A function of the number of channels.
    """

    def norm(num_features: int) -> renorm.Norm:
        return renorm.Norm(
            num_features,
            momentum=run.momentum,
            limits=renorm.Limits.over(run.steps) if run.limits else None,
            examples_per_group=run.examples_per_group,
            channels_per_group=run.channels_per_group,
            tracking=run.tracking,  # type: ignore[arg-type]  # a str here, so that a run can be written to a CSV file
        )

    return norm
