"""Batch (re)normalization in plain PyTorch: the definition that every other backend is tested against.

Shapes in comments: N examples, C channels and positions *S; G example groups of n examples, K channel groups
of k channels. Big tensors are viewed as (G, n, C, *S). Everything else is one number per group, and so are the
correction's r and d: they never cost a pass over the data.

Names beside Ioffe 2017, algorithm 1: `group.mean` is mu_B and `sigma` is sigma_B; `centered` is x - mu_B.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..grouping import Grouping
from ..moments import Moments
from .problem import Correction, Forward, Gradients, Running
from .statistics import apply, center, collect, correct, element_dims, expand, pool, scale_shift, spread


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    correction: Running | Correction | None,
    grouping: Grouping,
    eps: float,
) -> Forward:
    """Training forward: normalize every group by its own moments, then correct by r and d.

    Args:
        x: input, (N, C, *S), not empty.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        mask: True where an element counts, (N, *S), or None.
        correction: what r and d are computed from, or r and d themselves; None for batch norm (r = 1, d = 0).
        grouping: which elements share statistics.
        eps: added to the variance.

    Returns:
        The output, the moments, and r and d.
    """
    k = grouping.channels_per_group
    equal_groups = grouping.parts(x.shape[0])
    if len(equal_groups) == 1:
        return _forward(x, weight, bias, mask, correction, equal_groups[0][0], k, eps)
    parts = _parts(grouping, x.shape[0])
    pieces = [
        _forward(
            x[part.examples], weight, bias, _rows(mask, part.examples),
            _of_groups(correction, part.groups) if isinstance(correction, Correction) else correction,
            part.num_groups, k, eps,
        )
        for part in parts
    ]  # fmt: skip
    corrections = [piece.correction for piece in pieces if piece.correction is not None]
    return Forward(
        torch.cat([piece.y for piece in pieces]),
        Moments(*map(torch.cat, zip(*(piece.moments for piece in pieces), strict=True))),
        Correction(*map(torch.cat, zip(*corrections, strict=True))) if corrections else None,
    )


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    moments: Moments,
    correction: Correction | None,
    grouping: Grouping,
    eps: float,
) -> Gradients:
    """Gradients of `forward`, in closed form; differentiable once more where grad mode is on.

    With g = dL/dx_hat and z = (x - mu_B) / sigma_B over the m elements of a group (P1, section 3):
    dL/dx = r / sigma_B * (g - mean(g) - z * mean(g * z)).

    Args:
        dy: gradient of the output, (N, C, *S).
        x: input of the forward.
        weight: gamma, (C,), or None for 1.
        mask: mask of the forward.
        moments: moments of the forward, (G, C).
        correction: r and d of the forward.
        grouping: which elements share statistics.
        eps: added to the variance.

    Returns:
        The gradients of x, weight and bias.
    """
    k = grouping.channels_per_group
    equal_groups = grouping.parts(x.shape[0])
    if len(equal_groups) == 1:
        return _backward(dy, x, weight, mask, moments, correction, equal_groups[0][0], k, eps)
    parts = _parts(grouping, x.shape[0])
    pieces = [
        _backward(
            dy[part.examples], x[part.examples], weight, _rows(mask, part.examples),
            Moments(*(moment[part.groups] for moment in moments)), _of_groups(correction, part.groups),
            part.num_groups, k, eps,
        )
        for part in parts
    ]  # fmt: skip
    dx, dweight, dbias = zip(*pieces, strict=True)
    return Gradients(torch.cat(dx), sum(dweight[1:], dweight[0]), sum(dbias[1:], dbias[0]))


class _Part(NamedTuple):
    examples: slice
    groups: slice
    num_groups: int


def _parts(grouping: Grouping, num_examples: int) -> list[_Part]:
    parts, example, group = [], 0, 0
    for num_groups, size in grouping.parts(num_examples):
        examples = slice(example, example + num_groups * size)
        parts.append(_Part(examples, slice(group, group + num_groups), num_groups))
        example, group = examples.stop, group + num_groups
    return parts


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _of_groups(correction: Correction | None, groups: slice) -> Correction | None:
    return None if correction is None else Correction(correction.r[groups], correction.d[groups])


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    correction: Running | Correction | None,
    num_groups: int,
    k: int,
    eps: float,
) -> Forward:
    view, view_mask = _views(x, mask, num_groups)
    centered, drift, channel = center(view, view_mask)
    group = pool(channel, k)
    if isinstance(correction, Running):
        correction = correct(group, correction, k, eps)
    scale = (group.var + eps).rsqrt()  # (G, K)
    if correction is not None:
        scale = scale * correction.r
    scale = spread(scale, k)
    # x_hat = (x - mu_B) * r / sigma_B + d, and x - mu_B = centered + offset
    shift = scale * (channel.mean - spread(group.mean, k) - drift)
    if correction is not None:
        shift = shift + spread(correction.d, k)
    y = apply(centered, scale, shift, weight, bias)
    if view_mask is not None:
        y = y.where(view_mask, 0)
    return Forward(_merged(y, x.shape).to(x.dtype), channel, correction)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    channel: Moments,
    correction: Correction | None,
    num_groups: int,
    k: int,
    eps: float,
) -> Gradients:
    view, view_mask = _views(x, mask, num_groups)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        channel = center(view, view_mask)[2]  # a second backward must see how the moments depend on x
    group = pool(channel, k)
    dy = dy.unflatten(0, (num_groups, -1)).to(channel.mean.dtype)
    centered = view - expand(channel.mean, view.ndim)
    if view_mask is not None:
        dy, centered = dy.where(view_mask, 0), centered.where(view_mask, 0)
    dims = element_dims(view)
    sum_dy, dot = dy.sum(dims), (dy * centered).sum(dims)  # (G, C)

    offset = channel.mean - spread(group.mean, k)
    dot = dot + offset * sum_dy  # sum of dy * (x - mu_B)
    inverse_sigma = (group.var + eps).rsqrt()  # (G, K)
    scale = inverse_sigma if correction is None else inverse_sigma * correction.r
    dweight = dot * spread(scale, k)
    if correction is not None:
        dweight = dweight + sum_dy * spread(correction.d, k)

    scale = scale.where(group.count > 1, 0)  # through a single element no gradient flows, not even rounding
    gamma = torch.ones_like(channel.mean[0]) if weight is None else weight.to(channel.mean.dtype)
    count = group.count.clamp(min=1)
    mean_g = collect(gamma * sum_dy, k) / count
    mean_gz = collect(gamma * dot, k) * inverse_sigma / count
    slope = -scale * inverse_sigma * mean_gz
    dx = scale_shift(
        centered,
        expand(spread(slope, k), view.ndim),
        expand(spread(slope, k) * offset - spread(scale * mean_g, k), view.ndim),
    )
    factor = expand(spread(scale, k) * gamma, view.ndim)
    dx = dx + dy * factor if torch.is_grad_enabled() else dx.addcmul_(dy, factor)
    if view_mask is not None:
        dx = dx.where(view_mask, 0)
    return Gradients(dx.flatten(0, 1).to(x.dtype), dweight.sum(0), sum_dy.sum(0))


def _merged(view: Tensor, shape: torch.Size) -> Tensor:
    """(G, n, C, *S) as (N, C, *S), and to autograd not a view, so that an in-place activation may follow."""
    groups, examples = view.shape[:2]
    if groups == 1 or examples == 1 or view.stride(0) == examples * view.stride(1):
        merged: Tensor = torch.ops.aten._unsafe_view(view, shape)
        return merged
    return view.flatten(0, 1)


def _views(x: Tensor, mask: Tensor | None, num_groups: int) -> tuple[Tensor, Tensor | None]:
    # (G, n, C, *S) and (G, n, 1, *S); both are views in any memory format
    view_mask = None if mask is None else mask.unflatten(0, (num_groups, -1)).unsqueeze(2)
    return x.unflatten(0, (num_groups, -1)), view_mask
