"""One group per channel, eager and without a mask: by torch's own kernels, in as few operations as possible.

The mathematics is that of `reference`, arranged for speed: what is big, (N, C, *S), is read as seldom as torch's
kernels allow, and of the operations on what is small, (C,), each costs a microsecond or more.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..grouping import Grouping
from ..moments import Moments
from .problem import Correction, Forward, Gradients, Running

# The kernel for channels_last sums naively: over this many squares in float32 its error stays near 1e-6.
_ROWS_PER_SUM = 2**14


def suits(x: Tensor, mask: Tensor | None, grouping: Grouping) -> bool:
    """Whether `forward` and `backward` can take the place of the reference.

    Args:
        x: input, (N, C, *S).
        mask: mask, or None.
        grouping: which elements share statistics.

    Returns:
        True for a per-channel group of the whole batch on a CPU, in eager mode, and not where a second backward
        must see how the moments depend on x.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if x.device.type != "cpu" or mask is not None or x.dtype not in (torch.float32, torch.float64):
        return False
    return grouping.is_plain(x.shape[0]) and _is_laid_out_plainly(x)


def _is_laid_out_plainly(x: Tensor) -> bool:
    # torch's kernels err on other strides, even where those of a dimension of size 1 are all that differs
    positions = range(x.ndim - 1, 1, -1)
    return x.stride() in (_dense_strides(x, (*positions, 1, 0)), _dense_strides(x, (1, *positions, 0)))


def _dense_strides(x: Tensor, dims_from_innermost: Iterable[int]) -> tuple[int, ...]:
    strides, step = [0] * x.ndim, 1
    for dim in dims_from_innermost:
        strides[dim] = step
        step *= x.shape[dim]
    return tuple(strides)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, correction: Running | Correction | None, eps: float
) -> Forward:
    """`reference.forward` for one group per channel.

    Args:
        x: input, (N, C, *S), float32 or float64, not empty.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        correction: what r and d are computed from, or r and d themselves; None for batch norm.
        eps: added to the variance.

    Returns:
        The output, the moments, and r and d.
    """
    centered, drift, mean, var = _center(x)
    scale = (var + eps).rsqrt_()
    shift = None
    if correction is not None:
        r, d = correct(mean, scale, correction, eps) if isinstance(correction, Running) else _squeezed(correction)
        correction = Correction(r[None], d[None])
        scale, shift = scale * r, d
    if weight is not None:
        weight = weight.to(scale.dtype)
        scale, shift = scale * weight, None if shift is None else shift * weight
    offset = -drift * scale if shift is None else torch.addcmul(shift, drift, scale, value=-1)
    if bias is not None:
        offset = offset + bias.to(scale.dtype)
    per_channel = (-1,) + (1,) * (x.ndim - 2)
    y = _scale_shift_(centered, scale.view(per_channel), offset.view(per_channel))
    count = scale.new_full((1, 1), x.numel() // x.shape[1])
    return Forward(y, Moments(mean[None], var[None], count), correction)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, moments: Moments, correction: Correction | None, eps: float
) -> Gradients:
    """`reference.backward` for one group per channel: batch norm's backward with gamma * r in place of gamma.

    Args:
        dy: gradient of the output, (N, C, *S).
        x: input of the forward.
        weight: gamma, (C,), or None for 1.
        moments: moments of the forward, (1, C).
        correction: r and d of the forward, (1, C) each.
        eps: added to the variance.

    Returns:
        The gradients of x, weight and bias.
    """
    mean, scale = moments.mean[0], None if weight is None else weight.to(moments.mean.dtype)
    if correction is not None:
        r, d = _squeezed(correction)
        scale = r if scale is None else scale * r
    inverse_sigma = (moments.var[0] + eps).rsqrt_()
    if dy.stride() != x.stride():
        dy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(dy)
    dx, dscale, dbias = torch.ops.aten.native_batch_norm_backward(
        dy, x, scale, None, None, mean, inverse_sigma, True, eps, [True, True, True]
    )
    return Gradients(dx, dscale if correction is None else torch.addcmul(dbias * d, dscale, r), dbias)


def _center(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `statistics.center`: x less a near mean, how far that is off, mean and variance."""
    dims = [0, *range(2, x.ndim)]
    near = x[: max(1, x.shape[0] // 8)].mean(dims, keepdim=True)
    centered = x - near
    total, squares = _sums(centered)
    count = x.numel() // x.shape[1]
    drift = total / count
    var = torch.addcmul(squares / count, drift, drift, value=-1).clamp_(min=0)
    return centered, drift, near.flatten() + drift, var


def _sums(centered: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of x and of x * x over all but the channels."""
    if centered.ndim > 2 and centered.is_contiguous():
        return _sums_by_batch_norm(centered)
    rows = centered.movedim(1, -1).flatten(0, -2)
    if len(rows) <= _ROWS_PER_SUM:
        return _sums_by_batch_norm(rows)
    total, squares = zip(*map(_sums_by_batch_norm, rows.split(_ROWS_PER_SUM)), strict=True)
    return torch.stack(total).sum(0), torch.stack(squares).sum(0)


def _sums_by_batch_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    # The weight's gradient, sum(dy * (x - mean) * invstd), with mean 0 and invstd 1: one pass, no temporary.
    zeros, ones = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    _, squares, total = torch.ops.aten.native_batch_norm_backward(
        x, x, None, None, None, zeros, ones, True, 0.0, [False, True, True]
    )
    return total, squares


def correct(mean: Tensor, inverse_sigma: Tensor, running: Running, eps: float) -> tuple[Tensor, Tensor]:
    """r and d of `statistics.correct` for one group per channel, from 1 / sigma.

    Args:
        mean: of the batch, (C,).
        inverse_sigma: 1 / sqrt(var + eps) of the batch, (C,).
        running: running statistics and limits.
        eps: added to the variance.

    Returns:
        r and d, (C,) each.
    """
    inverse_running_sigma = (running.var + eps).rsqrt_()
    r = (inverse_running_sigma / inverse_sigma).clamp_(1 / running.r_max, running.r_max)
    d = (mean - running.mean).mul_(inverse_running_sigma).clamp_(-running.d_max, running.d_max)
    return r, d


def _squeezed(correction: Correction) -> tuple[Tensor, Tensor]:
    return correction.r[0], correction.d[0]


def _scale_shift_(tensor: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if tensor.stride(1) != 1:  # two fast passes, where a fused one would step through the channels
        return tensor.mul_(scale).add_(shift)
    return torch.addcmul(shift, tensor, scale, out=tensor)
