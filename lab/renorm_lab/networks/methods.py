"""The methods that are compared: settings of the one normalization layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import renorm

from ..runs import Run
from .variants import VARIANTS

MethodName = Literal[
    "batch_norm", "batch_renorm", "batch_renorm_close", "batch_renorm_unlimited", "ghost_batch_norm",
    "batch_group_norm", "batch_group_renorm", "group_norm", "instance_norm",
]  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A normalization method: its grouping of channels, its tracking rule, and whether it corrects.

    Args:
        label: name in tables and plots.
        tracking: rule by which the running variance moves, the default of the named layer.
        limits: whether batch renorm's correction applies.
        channels_per_group: channels that share statistics.
        example_weight: alpha of its ordinary evaluation.
        r_max: limit of r once the ramp is over.
        d_max: limit of d once the ramp is over.
    """

    label: str
    tracking: str
    limits: bool = False
    channels_per_group: int = 1
    example_weight: float = 0.0
    r_max: float = 3.0
    d_max: float = 5.0


METHODS: dict[MethodName, Method] = {
    "batch_norm": Method("batch norm", "var"),
    "batch_renorm": Method("batch renorm", "std", limits=True),
    "batch_renorm_close": Method("batch renorm, r to 1.5, d to 0.5", "std", limits=True, r_max=1.5, d_max=0.5),
    "batch_renorm_unlimited": Method("batch renorm, no limits", "std", limits=True, r_max=math.inf, d_max=math.inf),
    "ghost_batch_norm": Method("ghost batch norm", "total"),
    "batch_group_norm": Method("batch-group norm", "total", channels_per_group=8),
    "batch_group_renorm": Method("batch-group norm + limits", "total", limits=True, channels_per_group=8),
    "group_norm": Method("group norm", "total", channels_per_group=8, example_weight=1.0),
    "instance_norm": Method("instance norm", "total", example_weight=1.0),
}


def rows(method: MethodName, ghost_sizes: Iterable[int], group_size: int) -> list[tuple[str, int | None]]:
    """The rows of a table that a method has.

    Args:
        method: normalization method.
        ghost_sizes: examples that share statistics in ghost batch norm, one row each.
        group_size: examples that share statistics in batch-group norm.

    Returns:
        Label and examples that share statistics of each row; None for what the method itself says.
    """
    label = METHODS[method].label
    if (METHODS[method].channels_per_group == 1 and method != "ghost_batch_norm") or method == "group_norm":
        return [(label, None)]
    sizes = ghost_sizes if method == "ghost_batch_norm" else (group_size,)
    return [(f"{label}, n = {size}", size) for size in sizes]


def labelled_rows(
    methods: Iterable[MethodName], frozen_shares: Iterable[float]
) -> dict[str, tuple[MethodName, dict[str, Any]]]:
    """The rows of a table of methods, and of batch norm that is frozen to its running statistics in the end.

    Args:
        methods: normalization methods.
        frozen_shares: of the training, at its end, one row each.

    Returns:
        Method and other fields of `Run` by label.
    """
    rows: dict[str, tuple[MethodName, dict[str, Any]]] = {METHODS[method].label: (method, {}) for method in methods}
    for share in frozen_shares:
        when = "" if share == 1 else f" for the last {share:.0%}"
        rows[f"{METHODS['batch_norm'].label}, frozen{when}"] = "batch_norm", {"frozen_share": share}
    return rows


def norm_factory(run: Run) -> partial[renorm.Norm]:
    """What makes the normalization layers of a run.

    Args:
        run: the run.

    Returns:
        A layer class with its options, to be called with the number of channels.

    Raises:
        ValueError: there is no such variant.
    """
    options: dict[str, Any] = {
        "momentum": run.momentum,
        "limits": limits(run) if run.limits else None,
        "examples_per_group": run.examples_per_group,
        "channels_per_group": run.channels_per_group,
        "tracking": run.tracking,
    }
    if not run.variant:
        return partial(renorm.Norm, **options)
    if run.variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {run.variant}")
    return partial(VARIANTS[run.variant], **options | {"total_steps": run.steps})


def limits(run: Run) -> renorm.Limits:
    """The limits of a run's correction, by step.

    Args:
        run: the run.

    Returns:
        The paper's ramps in proportion to the training's length, but for what the run says.
    """
    paper = renorm.Limits.over(run.steps, run.r_max, run.d_max)
    start = round(paper.start * run.plain_phase)
    r_end, d_end = (start + round((end - paper.start) * run.ramps) for end in (paper.r_end, paper.d_end))
    return replace(paper, start=start, r_end=r_end, d_end=d_end)
