"""What torch's own batch norm kernels can do for us: fewer passes over the data than plain tensor code."""

from __future__ import annotations

import torch
from torch import Tensor

from ..grouping import Grouping
from ..moments import Moments
from .types import Correction, Gradients


def sum_and_dot(u: Tensor, v: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Sums of u and of u * v over the elements of every channel and group.

    Args:
        u: (G, n, C, *S), floating.
        v: shape and dtype of u.
        dims: every dimension but those of G and C.

    Returns:
        sum(u) and sum(u * v), (G, C) each.
    """
    if not _suits_reduction(u, v):
        return u.sum(dims), (u * v).sum(dims)
    # Batch norm's weight gradient, sum(dy * (x - mean) * invstd), with mean 0 and invstd 1: one pass, no temporary.
    zeros, ones = u.new_zeros(u.shape[2]), u.new_ones(u.shape[2])
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        u[0], v[0], None, None, None, zeros, ones, True, 0.0, [False, True, True]
    )
    return total[None], dot[None]


def _suits_reduction(u: Tensor, v: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if u.device.type != "cpu" or u.ndim != 5 or u.shape[0] != 1:
        return False
    layout = torch.contiguous_format if u[0].is_contiguous() else torch.channels_last
    return u[0].is_contiguous(memory_format=layout) and v[0].is_contiguous(memory_format=layout)


def scale_shift_(tensor: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """tensor * scale + shift, in place.

    Args:
        tensor: (G, n, C, *S).
        scale: (G, 1, C, 1, ...).
        shift: shape of `scale`.

    Returns:
        `tensor`.
    """
    if tensor.stride(2) != 1:  # two fast passes, where a fused one would step through the channels
        return tensor.mul_(scale).add_(shift)
    return torch.addcmul(shift, tensor, scale, out=tensor)


def suits_backward(mask: Tensor | None, moments: Moments, grouping: Grouping) -> bool:
    """Whether `backward` can take the place of `reference.backward`.

    Args:
        mask: mask of the forward.
        moments: moments of the forward, (G, C).
        grouping: which elements share statistics.

    Returns:
        True for one group per channel without a mask, eager and not for a second backward, since the kernel
        takes the moments for constants.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    one_group = moments.mean.shape[0] == 1 and grouping.is_per_channel
    return one_group and mask is None and moments.mean.device.type in ("cpu", "cuda")


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
    mean = moments.mean[0]
    gamma = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    scale = gamma if correction is None else gamma * correction.r[0]
    dx, dscale, dbias = torch.ops.aten.native_batch_norm_backward(
        dy, x, scale, None, None, mean, (moments.var[0] + eps).rsqrt(), True, eps, [True, True, True]
    )
    if correction is None:
        return Gradients(dx, dscale, dbias)
    return Gradients(dx, dscale * correction.r[0] + dbias * correction.d[0], dbias)
