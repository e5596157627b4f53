"""How the running statistics move: one rule per function, all stored as a mean and a variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..moments import Moments
from .normalize import suits_kernels
from .plain import suits_state

Tracking = Literal["std", "var", "total"]


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
    require_tracking(tracking)
    moments = Moments(*(moment.to(running_mean.dtype) for moment in moments))
    batch = moments.merged(0)  # (C,)
    mean = torch.lerp(running_mean, batch.mean, momentum)
    if tracking == "total":
        between = (batch.mean - running_mean).square()
        return mean, torch.lerp(running_var, batch.var, momentum) + momentum * (1 - momentum) * between
    update = _update_std if tracking == "std" else _update_var
    var = update(running_var, moments, batch, momentum, eps)
    has_spread = (moments.count * channels_per_group > 1).any() & (batch.count > 1)
    return mean, torch.where(has_spread, var, running_var)


class RunningState(NamedTuple):
    """The buffers of a layer that a batch moves.

    Args:
        mean: running means, (C,), float32 or float64.
        var: running variances, (C,), same dtype.
        steps: batches that moved them, 0-d int64.
        skipped: batches that did not, because their moments were not finite; 0-d int64.
    """

    mean: Tensor
    var: Tensor
    steps: Tensor
    skipped: Tensor


def commit(
    state: RunningState,
    moments: Moments,
    *,
    momentum: float | None,
    tracking: Tracking,
    channels_per_group: int,
    eps: float,
) -> None:
    """Move a layer's buffers by one batch, in place and without leaving the device.

    A batch whose moments are not finite is only counted, one without a counted element not even that.

    Args:
        state: the buffers.
        moments: of every channel in every example group, (G, C), with count (G, 1).
        momentum: weight of the batch; None for the cumulative average.
        tracking: see `update_running`.
        channels_per_group: see `update_running`.
        eps: see `update_running`.
    """
    if _suits_kernels(state, moments):
        torch.ops.renorm.track.default(*state, *moments, tracking, momentum, channels_per_group, eps)
        torch.autograd.graph.increment_version(state)
        return
    with torch.no_grad():
        _commit_plainly(state, moments, momentum, tracking, channels_per_group, eps)


def commit_together(state: RunningState, batches: Sequence[Moments], **rule: Any) -> None:
    """Move a layer's buffers once by several batches, as if they were groups of one.

    Batches whose moments are not finite are left out and counted.

    Args:
        state: the buffers.
        batches: moments of every channel in every example group of each, (G, C), with count (G, 1).
        **rule: see `commit`.
    """
    if not batches:
        return
    if len(batches) == 1:
        commit(state, batches[0], **rule)
        return
    with torch.no_grad():
        mean, var, count = (torch.cat(parts) for parts in zip(*batches, strict=True))
        is_finite = (0 * (mean + var)).sum(1) == 0  # (G of all batches,)
        sizes = [len(moments.mean) for moments in batches]
        of_batches = torch.stack([groups.all() for groups in is_finite.split(sizes)])
        kept = of_batches.repeat_interleave(torch.tensor(sizes, device=mean.device), output_size=len(mean))[:, None]
        state.skipped.add_((~of_batches).sum())
    commit(state, Moments(mean.where(kept, 0), var.where(kept, 0), count.where(kept, 0)), **rule)


def _commit_plainly(
    state: RunningState, moments: Moments, momentum: float | None, tracking: Tracking, k: int, eps: float
) -> None:
    weight = 1 / (state.steps + 1).to(state.mean.dtype) if momentum is None else momentum
    mean, var = update_running(
        state.mean, state.var, moments,
        momentum=weight, tracking=tracking, channels_per_group=k, eps=eps,
    )  # fmt: skip
    finite = (0 * (moments.mean + moments.var)).sum() == 0  # 0 times anything else is not a number
    accepted = finite & (moments.count > 0).any()
    state.mean.copy_(torch.where(accepted, mean, state.mean))
    state.var.copy_(torch.where(accepted, var, state.var))
    state.steps.add_(accepted)
    state.skipped.add_(~finite)


def _suits_kernels(state: RunningState, moments: Moments) -> bool:
    if torch.compiler.is_compiling() or not suits_kernels(moments.mean, None):
        return False
    return moments.mean.dtype == state.mean.dtype and suits_state(moments.mean, state)


def _update_var(running_var: Tensor, moments: Moments, batch: Moments, momentum: float | Tensor, eps: float) -> Tensor:
    unbiased = batch.var * batch.count / (batch.count - 1).clamp(min=1)
    return torch.lerp(running_var, unbiased, momentum)


def _update_std(running_var: Tensor, moments: Moments, batch: Moments, momentum: float | Tensor, eps: float) -> Tensor:
    # The square of the moving average of sigma, less eps, in terms of variances, so that eps does not cancel.
    sigma = (moments.var + eps).sqrt()
    if len(sigma) == 1:
        mean_sigma, var = sigma[0], moments.var[0]
    else:
        share = moments.count / moments.count.sum(0).clamp(min=1)
        mean_sigma = (share * sigma).sum(0)
        var = (share * (moments.var - (sigma - mean_sigma).square())).sum(0)
    between = (mean_sigma - (running_var + eps).sqrt()).square()
    return torch.lerp(running_var, var, momentum) - momentum * (1 - momentum) * between


def require_tracking(tracking: str) -> None:
    """Refuse a rule that does not exist.

    Args:
        tracking: name of the rule.

    Raises:
        ValueError: it is none of "std", "var" and "total".
    """
    if tracking not in get_args(Tracking):
        raise ValueError(f"tracking must be one of {', '.join(map(repr, get_args(Tracking)))}, got {tracking!r}")
