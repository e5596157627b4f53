"""One group per channel on a GPU without Triton: by the kernels that torch has for synchronized batch norm.

They take the statistics apart from their application, which leaves room for r and d between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..grouping import Grouping
from ..moments import Moments
from . import aten
from .problem import Correction, Forward, Gradients, Running

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def suits(x: Tensor, mask: Tensor | None, grouping: Grouping) -> bool:
    """Whether `forward` and `backward` can take the place of the reference.

    Args:
        x: input, (N, C, *S).
        mask: mask, or None.
        grouping: which elements share statistics.

    Returns:
        True for a per-channel group of the whole batch on a GPU, in eager mode, and not where a second backward must
        see how the moments depend on x.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if not x.is_cuda or mask is not None or x.dtype not in _DTYPES:
        return False
    return grouping.is_plain(x.shape[0])


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, correction: Running | Correction | None, eps: float
) -> Forward:
    """`reference.forward` for one group per channel.

    Args:
        x: input, (N, C, *S), not empty.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        correction: what r and d are computed from, or r and d themselves; None for batch norm.
        eps: added to the variance.

    Returns:
        The output, the moments, and r and d.
    """
    mean, inverse_sigma = torch.batch_norm_stats(x, eps)
    var = (inverse_sigma.square().reciprocal() - eps).clamp_(min=0)
    scale, shift = weight, bias
    if correction is not None:
        if isinstance(correction, Running):
            r, d = aten.correct(mean, inverse_sigma, correction, eps)
        else:
            r, d = correction.r[0], correction.d[0]
        correction = Correction(r[None], d[None])
        scale = r if weight is None else r * weight
        shift = d if weight is None else d * weight
        shift = shift if bias is None else shift + bias
    y = torch.batch_norm_elemt(x, scale, shift, mean, inverse_sigma, eps)
    count = mean.new_full((1, 1), x.numel() // x.shape[1])
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
    mean, inverse_sigma = moments.mean[0], (moments.var[0] + eps).rsqrt()
    scale = None if weight is None else weight.to(mean.dtype)
    if correction is not None:
        scale = correction.r[0] if scale is None else scale * correction.r[0]
    sum_dy, sum_dy_centered, dscale, dbias = torch.batch_norm_backward_reduce(
        dy, x, mean, inverse_sigma, scale, True, True, True
    )
    count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
    dx = torch.batch_norm_backward_elemt(dy, x, mean, inverse_sigma, scale, sum_dy, sum_dy_centered, count)
    if correction is None:
        return Gradients(dx, dscale, dbias)
    return Gradients(dx, torch.addcmul(dbias * correction.d[0], dscale, correction.r[0]), dbias)
