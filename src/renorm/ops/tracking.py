"""How the running statistics move: one row of a table per rule, all stored as a mean and a variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..moments import Moments
from .problem import RunningState, Settings

Tracking = Literal["std", "var", "total"]


class Rule(NamedTuple):
    """How a layer's running statistics move.

    Args:
        tracking: name of the rule, in `RULES`.
        momentum: weight of a batch; None for the cumulative average.
    """

    tracking: Tracking
    momentum: float | None


class TrackingRule(NamedTuple):
    """What a rule does to the running variance; the kernels have theirs in csrc/tracking.cpp and triton/tracking.py.

    Over workers either standard deviations are summed or second moments; a rule of a third kind needs its sums in
    workers/sums.py.

    Args:
        move: the variance after a batch, from running mean, running variance, moments by group, the batch's moments,
            momentum and eps.
        averages_sigma: whether standard deviations are averaged over groups, batches and workers, and not second
            moments.
        is_unbiased: whether a batch's variance is divided by its elements less one.
        needs_spread: whether single elements, which say nothing of a spread, leave the variance as it was.
    """

    move: Callable[[Tensor, Tensor, Moments, Moments, float | Tensor, float], Tensor]
    averages_sigma: bool
    is_unbiased: bool
    needs_spread: bool


def _std(
    running_mean: Tensor, running_var: Tensor, groups: Moments, batch: Moments, momentum: float | Tensor, eps: float
) -> Tensor:
    # The square of the moving average of sigma, less eps, in terms of variances, so that eps does not cancel.
    sigma = (groups.var + eps).sqrt()
    if len(sigma) == 1:
        mean_sigma, var = sigma[0], groups.var[0]
    else:
        share = groups.count / groups.count.sum(0).clamp(min=1)
        mean_sigma = (share * sigma).sum(0)
        var = (share * (groups.var - (sigma - mean_sigma).square())).sum(0)
    between = (mean_sigma - (running_var + eps).sqrt()).square()
    return torch.lerp(running_var, var, momentum) - momentum * (1 - momentum) * between


def _var(
    running_mean: Tensor, running_var: Tensor, groups: Moments, batch: Moments, momentum: float | Tensor, eps: float
) -> Tensor:
    unbiased = batch.var * batch.count / (batch.count - 1).clamp(min=1)
    return torch.lerp(running_var, unbiased, momentum)


def _total(
    running_mean: Tensor, running_var: Tensor, groups: Moments, batch: Moments, momentum: float | Tensor, eps: float
) -> Tensor:
    between = (batch.mean - running_mean).square()
    return torch.lerp(running_var, batch.var, momentum) + momentum * (1 - momentum) * between


# In the order of the names in csrc/tracking.h.
RULES: dict[str, TrackingRule] = {
    "std": TrackingRule(_std, averages_sigma=True, is_unbiased=False, needs_spread=True),
    "var": TrackingRule(_var, averages_sigma=False, is_unbiased=True, needs_spread=True),
    "total": TrackingRule(_total, averages_sigma=False, is_unbiased=False, needs_spread=False),
}


def rule_of(tracking: str) -> TrackingRule:
    """The rule of a name.

    Args:
        tracking: name of the rule.

    Returns:
        The rule.

    Raises:
        ValueError: there is no such rule.
    """
    if tracking not in RULES:
        raise ValueError(f"tracking must be one of {', '.join(map(repr, RULES))}, got {tracking!r}")
    return RULES[tracking]


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    *,
    momentum: float | Tensor,
    tracking: Tracking,
    channels_per_group: int = 1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The running statistics after one more batch; one batch is one update, whatever its groups.

    Args:
        running_mean: (C,), float32 or float64.
        running_var: (C,), same dtype.
        moments: of every channel in every example group, (G, C), with count (G, 1).
        momentum: weight of the batch, in [0, 1] (PyTorch's convention), a number or a 0-d tensor.
        tracking: "std" averages the standard deviation over groups and batches (batch renormalization), "var"
            the batch's unbiased variance (nn.BatchNorm), "total" the second moment (P2: the variance around
            the running mean, between batches included).
        channels_per_group: consecutive channels that share statistics.
        eps: added to the variance where "std" takes its square root.

    Returns:
        New running_mean and running_var, (C,) each. "std" and "var" leave running_var as it was where every
        group has a single element, or a channel only one in all, since that says nothing of the spread.

    Raises:
        ValueError: there is no such rule.

    Source:
        Ioffe 2017, algorithm 1 ("std"); Ioffe & Szegedy 2015 ("var"); Summers & Dinneen 2020, section 3.1 ("total").

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> batch = Moments(torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([[4.0]]))
        >>> update_running(zero, one, batch, momentum=0.5, tracking="var")
        (tensor([1.]), tensor([2.5000]))
        >>> update_running(zero, one, batch, momentum=0.5, tracking="total")
        (tensor([1.]), tensor([3.]))
    """
    rule = rule_of(tracking)
    moments = Moments(*(moment.to(running_mean.dtype) for moment in moments))
    batch = moments.merged(0)  # (C,)
    mean = torch.lerp(running_mean, batch.mean, momentum)
    var = rule.move(running_mean, running_var, moments, batch, momentum, eps)
    if rule.needs_spread:
        has_spread = (moments.count * channels_per_group > 1).any() & (batch.count > 1)
        var = torch.where(has_spread, var, running_var)
    return mean, var


def move(state: RunningState, moments: Moments, rule: Rule, settings: Settings) -> None:
    """Move a layer's buffers by one batch, by torch's own operations; see `dispatch.track`.

    Args:
        state: the buffers.
        moments: of every channel in every example group, (G, C), with count (G, 1).
        rule: by which they move.
        settings: channels_per_group and eps.
    """
    momentum = 1 / (state.steps + 1).to(state.mean.dtype) if rule.momentum is None else rule.momentum
    with torch.no_grad():
        mean, var = update_running(
            state.mean, state.var, moments,
            momentum=momentum, tracking=rule.tracking,
            channels_per_group=settings.grouping.channels_per_group, eps=settings.eps,
        )  # fmt: skip
        finite = moments.finite().all()
        accepted = finite & (moments.count > 0).any()
        state.mean.copy_(torch.where(accepted, mean, state.mean))
        state.var.copy_(torch.where(accepted, var, state.var))
        state.steps.add_(accepted)
        state.skipped.add_(~finite)
