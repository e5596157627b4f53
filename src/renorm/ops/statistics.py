"""The per-group numbers of normalization, and how they apply to the data.

Shapes: N examples, C channels and positions *S; G example groups of n examples, K channel groups of k channels.
Big tensors are viewed as (G, n, C, *S).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..grouping import Grouping
from ..moments import Moments, accumulation_dtype
from ..transforms import is_transformed
from .problem import Correction, Target


def moments_of(x: Tensor, mask: Tensor | None, grouping: Grouping) -> Moments:
    """Moments of every channel in every example group of a batch.

    Args:
        x: input, (N, C, *S), not empty.
        mask: True where an element counts, (N, *S), or None.
        grouping: whose groups of examples they are.

    Returns:
        Moments (G, C), with count (G, 1).
    """
    found = []
    for run in grouping.runs(x.shape[0]):
        part = views(x[run.examples], None if mask is None else mask[run.examples], run.number)
        found.append(center(*part)[2])
    return found[0] if len(found) == 1 else Moments(*map(torch.cat, zip(*found, strict=True)))


def views(x: Tensor, mask: Tensor | None, num_groups: int) -> tuple[Tensor, Tensor | None]:
    # (G, n, C, *S) and (G, n, 1, *S); both are views in any memory format
    view_mask = None if mask is None else mask.unflatten(0, (num_groups, -1)).unsqueeze(2)
    return x.unflatten(0, (num_groups, -1)), view_mask


def center(view: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Moments]:
    """x less a shift near its channel means, how far the shift is off, and the moments.

    Sums of the shifted values do not suffer from a large mean, and the drift makes up for a shift that is only
    near: so a part of the examples will do for it. That part's mean is within sqrt(8) standard deviations.
    """
    dtype = accumulation_dtype(view.dtype)
    dims = element_dims(view)
    if mask is None:
        elements = view.shape[1] * math.prod(view.shape[3:])  # numel() of a shape would fix it for export
        count = torch.full((view.shape[0], 1), elements, dtype=dtype, device=view.device)
        shift = view[:, : max(1, view.shape[1] // 8)].mean(dims, dtype=dtype)
        centered = view - expand(shift, view.ndim)
    else:
        count = mask.sum(dims).to(dtype)
        shift = view.where(mask, 0).sum(dims, dtype=dtype) / count.clamp(min=1)
        centered = (view - expand(shift, view.ndim)).where(mask, 0)
    drift = centered.sum(dims) / count.clamp(min=1)
    var = (centered.square().sum(dims) / count.clamp(min=1) - drift.square()).clamp(min=0)
    return centered, drift, Moments(shift + drift, var, count)


def merge_channels(channel: Moments, channels_per_group: int) -> Moments:
    """Moments of channel groups from those of their channels.

    Args:
        channel: moments of every channel, (G, C); its count is (G, 1).
        channels_per_group: consecutive channels that share statistics.

    Returns:
        Moments (G, K).
    """
    if channels_per_group == 1:
        return channel
    grouped = Moments(
        channel.mean.unflatten(1, (-1, channels_per_group)),
        channel.var.unflatten(1, (-1, channels_per_group)),
        channel.count[..., None],
    )
    mean = grouped.mean.mean(2, keepdim=True)
    var = (grouped.var + (grouped.mean - mean).square()).mean(2)
    return Moments(mean.squeeze(2), var, channel.count * channels_per_group)


def merge_running(mean: Tensor, var: Tensor, channels_per_group: int) -> Moments:
    """The running mean and variance that every channel group sees.

    Args:
        mean: running means, (C,).
        var: running variances, (C,).
        channels_per_group: consecutive channels that share statistics.

    Returns:
        Moments (1, K), with a count of one per channel.
    """
    return merge_channels(Moments(mean[None], var[None], torch.ones_like(mean[None, :1])), channels_per_group)


def correct(group: Moments, target: Target, channels_per_group: int, eps: float) -> Correction:
    """r and d: how far the batch's statistics are from the running statistics, within the limits.

    Args:
        group: moments of every group, (G, K).
        target: running statistics and limits.
        channels_per_group: consecutive channels that share statistics.
        eps: added to the variances.

    Returns:
        r and d, (G, K) each.
    """
    running = merge_running(target.mean, target.var, channels_per_group)  # (1, K)
    sigma = (running.var + eps).sqrt()
    r = ((group.var + eps).sqrt() / sigma).clamp(1 / target.r_max, target.r_max)
    d = ((group.mean - running.mean) / sigma).clamp(-target.d_max, target.d_max)
    return Correction(r, d)


def apply(centered: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    # gamma and beta are folded into the per-channel numbers, (G, C)
    if weight is not None:
        scale, shift = scale * weight.to(scale.dtype), shift * weight.to(scale.dtype)
    if bias is not None:
        shift = shift + bias.to(scale.dtype)
    return scale_shift(centered, expand(scale, centered.ndim), expand(shift, centered.ndim))


def scale_shift(tensor: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if torch.is_grad_enabled() or is_transformed():
        return tensor * scale + shift
    return tensor.mul_(scale).add_(shift)


def expand(per_channel: Tensor, ndim: int) -> Tensor:
    # (G, C) -> (G, 1, C, 1, ...)
    return per_channel[(slice(None), None, ...) + (None,) * (ndim - 3)]


def spread(per_group: Tensor, k: int) -> Tensor:
    # (G, K) -> (G, C)
    return per_group if k == 1 else per_group.repeat_interleave(k, 1)


def collect(per_channel: Tensor, k: int) -> Tensor:
    # (G, C) -> (G, K), summed
    return per_channel if k == 1 else per_channel.unflatten(1, (-1, k)).sum(2)


def element_dims(view: Tensor) -> list[int]:
    return [1, *range(3, view.ndim)]
