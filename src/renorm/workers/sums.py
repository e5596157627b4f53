"""Moments as sums that workers can add: a header, then two numbers per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..moments import Moments
from ..tracking import Tracking

_HEADER = 3  # elements; groups of more than one element; batches that are not finite


def size(num_features: int) -> int:
    """Numbers that a layer sends.

    Args:
        num_features: C.

    Returns:
        Its share of the collective.
    """
    return _HEADER + 2 * num_features


def to_sums(batches: Sequence[Moments], tracking: Tracking, channels_per_group: int, eps: float) -> Tensor:
    """What a layer contributes. float64, in which E[x^2] - E[x]^2 keeps what float32 statistics need.

    Args:
        batches: moments of every channel in every example group of each batch, (G, C), at least one.
        tracking: rule by which the running variance moves: says which second sum it needs.
        channels_per_group: consecutive channels that share statistics.
        eps: added to the variance where "std" takes its square root.

    Returns:
        Sums over groups, (3 + 2 C,).
    """
    sums = [_sums(moments, tracking, channels_per_group, eps) for moments in batches]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _sums(moments: Moments, tracking: Tracking, k: int, eps: float) -> Tensor:
    mean, var, count = (moment.double() for moment in moments)
    second = (var + eps).sqrt() if tracking == "std" else var + mean.square()
    elements = count.sum()
    spread = (count * k > 1).sum()
    sums = torch.cat((torch.stack((elements, spread, elements * 0)), (count * torch.cat((mean, second), 1)).sum(0)))
    is_finite = (0 * sums).sum() == 0
    nothing = torch.zeros_like(sums)
    nothing[_HEADER - 1] = 1
    return torch.where(is_finite, sums, nothing)


def from_sums(
    sums: Tensor, running_var: Tensor, tracking: Tracking, channels_per_group: int, eps: float
) -> tuple[Moments, Tensor]:
    """The moments behind sums, as of one group that moves the running statistics as all the groups together do.

    Args:
        sums: over all workers, (3 + 2 C,).
        running_var: from before, (C,).
        tracking: as in `to_sums`.
        channels_per_group: as in `to_sums`.
        eps: as in `to_sums`.

    Returns:
        Moments (1, C) in the dtype of `running_var`, and the number of batches that were left out.
    """
    count, spread, skipped = sums[:_HEADER]
    mean, second = (sums[_HEADER:] / count.clamp(min=1)).chunk(2)
    var = second.square() - eps if tracking == "std" else second - mean.square()
    if tracking != "total":  # single elements say nothing of a spread: what leaves the running variance as it is
        still = running_var.double()
        still = still * (1 - 1 / count.clamp(min=1)) if tracking == "var" else still
        var = torch.where(spread > 0, var, still)
    dtype = running_var.dtype
    return Moments(mean[None].to(dtype), var[None].to(dtype), count[None, None].to(dtype)), skipped.long()
