"""One group per channel, eager and without a mask: by torch's own kernels, in as few operations as possible.

The mathematics is that of `reference`, arranged for speed: what is big, (N, C, *S), is read as seldom as torch's
kernels allow, and of the operations on what is small, (C,), each costs a microsecond or more.

On the CPU the sums come from the kernel of batch norm's backward. On a GPU the kernels are those of synchronized batch
norm: they take the statistics apart from their application, which leaves room for r and d between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..moments import Moments
from .problem import Correction, Gradients, Implementation, Inputs, Normalized, Settings, Target

# The kernel for channels_last sums naively: over this many squares in float32 its error stays near 1e-6.
_ROWS_PER_SUM = 2**14


def _forward_on_cpu(inputs: Inputs, settings: Settings, correction: Target | Correction | None) -> Normalized:
    x, weight, bias, *_ = inputs
    centered, drift, mean, var = _center(x)
    scale = (var + settings.eps).rsqrt_()
    shift = None
    if correction is not None:
        r, d = _r_and_d(mean, scale, correction, settings.eps)
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
    return _normalized(y, x, mean, var, correction)


def _backward_on_cpu(
    dy: Tensor, inputs: Inputs, settings: Settings, moments: Moments, correction: Correction | None
) -> Gradients:
    """Batch norm's backward with gamma * r in place of gamma."""
    x, eps = inputs.x, settings.eps
    scale = _gamma_times_r(inputs.weight, moments, correction)
    inverse_sigma = (moments.var[0] + eps).rsqrt_()
    if dy.stride() != x.stride():
        dy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(dy)
    dx, dscale, dbias = torch.ops.aten.native_batch_norm_backward(
        dy, x, scale, None, None, moments.mean[0], inverse_sigma, True, eps, [True, True, True]
    )
    return _gradients(dx, dscale, dbias, correction)


def _forward_on_gpu(inputs: Inputs, settings: Settings, correction: Target | Correction | None) -> Normalized:
    (x, weight, bias, *_), eps = inputs, settings.eps
    mean, inverse_sigma = torch.batch_norm_stats(x, eps)
    var = (inverse_sigma.square().reciprocal() - eps).clamp_(min=0)
    scale, shift = weight, bias
    if correction is not None:
        r, d = _r_and_d(mean, inverse_sigma, correction, eps)
        correction = Correction(r[None], d[None])
        scale = r if weight is None else r * weight
        shift = d if weight is None else d * weight
        shift = shift if bias is None else shift + bias
    y = torch.batch_norm_elemt(x, scale, shift, mean, inverse_sigma, eps)
    return _normalized(y, x, mean, var, correction)


def _backward_on_gpu(
    dy: Tensor, inputs: Inputs, settings: Settings, moments: Moments, correction: Correction | None
) -> Gradients:
    """Batch norm's backward with gamma * r in place of gamma."""
    x, mean = inputs.x, moments.mean[0]
    scale = _gamma_times_r(inputs.weight, moments, correction)
    inverse_sigma = (moments.var[0] + settings.eps).rsqrt()
    sum_dy, sum_dy_centered, dscale, dbias = torch.batch_norm_backward_reduce(
        dy, x, mean, inverse_sigma, scale, True, True, True
    )
    count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
    dx = torch.batch_norm_backward_elemt(dy, x, mean, inverse_sigma, scale, sum_dy, sum_dy_centered, count)
    return _gradients(dx, dscale, dbias, correction)


CPU = Implementation(_forward_on_cpu, _backward_on_cpu)
GPU = Implementation(_forward_on_gpu, _backward_on_gpu)


def _normalized(y: Tensor, x: Tensor, mean: Tensor, var: Tensor, correction: Correction | None) -> Normalized:
    count = mean.new_full((1, 1), x.numel() // x.shape[1])
    return Normalized(y, Moments(mean[None], var[None], count), correction)


def _gamma_times_r(weight: Tensor | None, moments: Moments, correction: Correction | None) -> Tensor | None:
    # contiguous, since torch's backward reads a strided weight as if it were
    scale = None if weight is None else weight.to(moments.mean.dtype).contiguous()
    if correction is None:
        return scale
    return correction.r[0] if scale is None else scale * correction.r[0]


def _gradients(dx: Tensor, dscale: Tensor, dbias: Tensor, correction: Correction | None) -> Gradients:
    if correction is None:
        return Gradients(dx, dscale, dbias)
    return Gradients(dx, torch.addcmul(dbias * correction.d[0], dscale, correction.r[0]), dbias)


def _r_and_d(mean: Tensor, inverse_sigma: Tensor, correction: Target | Correction, eps: float) -> tuple[Tensor, Tensor]:
    """What `statistics.correct` computes, from 1 / sigma; or r and d as given, (C,) each."""
    if isinstance(correction, Correction):
        return correction.r[0], correction.d[0]
    inverse_running_sigma = (correction.var + eps).rsqrt_()
    r = (inverse_running_sigma / inverse_sigma).clamp_(1 / correction.r_max, correction.r_max)
    d = (mean - correction.mean).mul_(inverse_running_sigma).clamp_(-correction.d_max, correction.d_max)
    return r, d


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


def _scale_shift_(tensor: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if tensor.stride(1) != 1:  # two fast passes, where a fused one would step through the channels
        return tensor.mul_(scale).add_(shift)
    return torch.addcmul(shift, tensor, scale, out=tensor)
