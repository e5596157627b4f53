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
from .aten import scale_shift_, sum_and_dot
from .types import Correction, Forward, Gradients, Running


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
    parts = _parts(grouping, x.shape[0])
    if len(parts) == 1:
        return _forward(x, weight, bias, mask, correction, parts[0].num_groups, k, eps)
    pieces = [
        _forward(
            x[part.examples], weight, bias, _rows(mask, part.examples), _groups(correction, part.groups),
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
    parts = _parts(grouping, x.shape[0])
    pieces = [
        _backward(
            dy[part.examples], x[part.examples], weight, _rows(mask, part.examples),
            Moments(*(moment[part.groups] for moment in moments)), _groups(correction, part.groups),
            part.num_groups, k, eps,
        )
        for part in parts
    ]  # fmt: skip
    if len(pieces) == 1:
        return pieces[0]
    dx, dweight, dbias = zip(*pieces, strict=True)
    return Gradients(torch.cat(dx), sum(dweight[1:], dweight[0]), sum(dbias[1:], dbias[0]))


def correct(group: Moments, running: Running, channels_per_group: int, eps: float) -> Correction:
    """r and d: how far the batch's statistics are from the running statistics, within the limits.

    Args:
        group: moments of every group, (G, K).
        running: running statistics and limits.
        channels_per_group: consecutive channels that share statistics.
        eps: added to the variances.

    Returns:
        r and d, (G, K) each.
    """
    target = pool_running(running.mean, running.var, channels_per_group)  # (1, K)
    sigma = (target.var + eps).sqrt()
    r = ((group.var + eps).sqrt() / sigma).clamp(1 / running.r_max, running.r_max)
    d = ((group.mean - target.mean) / sigma).clamp(-running.d_max, running.d_max)
    return Correction(r, d)


def pool(channel: Moments, channels_per_group: int) -> Moments:
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


def pool_running(mean: Tensor, var: Tensor, channels_per_group: int) -> Moments:
    """The running mean and variance that every channel group sees.

    Args:
        mean: running means, (C,).
        var: running variances, (C,).
        channels_per_group: consecutive channels that share statistics.

    Returns:
        Moments (1, K), with a count of one per channel.
    """
    return pool(Moments(mean[None], var[None], torch.ones_like(mean[None, :1])), channels_per_group)


def evaluate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    example_weight: float,
    channels_per_group: int,
    eps: float,
) -> Tensor:
    """Evaluation: running statistics, weighed with those of each example by itself.

    Args:
        x: input, (N, C, *S), not empty.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        mask: True where an element counts, (N, *S), or None.
        running_mean: (C,).
        running_var: (C,).
        example_weight: alpha, the weight of the example's own statistics, in [0, 1].
        channels_per_group: consecutive channels that share statistics.
        eps: added to the variance.

    Returns:
        The output, shape and dtype of x; differentiable, through the example's own statistics too.
    """
    k = channels_per_group
    running = pool_running(running_mean, running_var, k)  # (1, K)
    view = x.unsqueeze(1)  # every example is a group: (G = N, 1, C, *S)
    view_mask = None if mask is None else mask[:, None, None]
    centered, drift, channel = _center(view, view_mask)
    example = pool(channel, k)  # (N, K)
    alpha = example_weight if mask is None else (example.count > 0) * example_weight
    difference = example.mean - running.mean
    var = running.var + alpha * (example.var - running.var) + alpha * (1 - alpha) * difference.square()
    # x - mean, with mean = mu + alpha * (e - mu), from the example's centered channels
    offset = channel.mean - _spread(example.mean, k) - drift + _spread((1 - alpha) * difference, k)
    scale = _spread((var + eps).rsqrt(), k)
    y = _apply(centered, scale, scale * offset, weight, bias)
    if view_mask is not None:
        y = y.where(view_mask, 0)
    return y.squeeze(1).to(x.dtype)


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


def _groups(correction: Running | Correction | None, groups: slice) -> Running | Correction | None:
    if not isinstance(correction, Correction):
        return correction
    return Correction(correction.r[groups], correction.d[groups])


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
    centered, drift, channel = _center(view, view_mask)
    group = pool(channel, k)
    if isinstance(correction, Running):
        correction = correct(group, correction, k, eps)
    scale = (group.var + eps).rsqrt()  # (G, K)
    if correction is not None:
        scale = scale * correction.r
    scale = _spread(scale, k)
    # x_hat = (x - mu_B) * r / sigma_B + d, and x - mu_B = centered + offset
    shift = scale * (channel.mean - _spread(group.mean, k) - drift)
    if correction is not None:
        shift = shift + _spread(correction.d, k)
    y = _apply(centered, scale, shift, weight, bias)
    if view_mask is not None:
        y = y.where(view_mask, 0)
    return Forward(y.flatten(0, 1).to(x.dtype), channel, correction)


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
        channel = _center(view, view_mask)[2]  # a second backward must see how the moments depend on x
    group = pool(channel, k)
    dy = dy.unflatten(0, (num_groups, -1)).to(channel.mean.dtype)
    centered = view - _expand(channel.mean, view.ndim)
    if view_mask is not None:
        dy, centered = dy.where(view_mask, 0), centered.where(view_mask, 0)
    dims = _element_dims(view)
    sum_dy, dot = sum_and_dot(dy, centered, dims)  # (G, C)

    offset = channel.mean - _spread(group.mean, k)
    dot = dot + offset * sum_dy  # sum of dy * (x - mu_B)
    inverse_sigma = (group.var + eps).rsqrt()  # (G, K)
    scale = inverse_sigma if correction is None else inverse_sigma * correction.r
    dweight = dot * _spread(scale, k)
    if correction is not None:
        dweight = dweight + sum_dy * _spread(correction.d, k)

    gamma = torch.ones_like(channel.mean[0]) if weight is None else weight.to(channel.mean.dtype)
    count = group.count.clamp(min=1)
    mean_g = _collect(gamma * sum_dy, k) / count
    mean_gz = _collect(gamma * dot, k) * inverse_sigma / count
    slope = -scale * inverse_sigma * mean_gz
    dx = _scale_shift(
        centered,
        _expand(_spread(slope, k), view.ndim),
        _expand(_spread(slope, k) * offset - _spread(scale * mean_g, k), view.ndim),
    )
    factor = _expand(_spread(scale, k) * gamma, view.ndim)
    dx = dx + dy * factor if torch.is_grad_enabled() else dx.addcmul_(dy, factor)
    if view_mask is not None:
        dx = dx.where(view_mask, 0)
    return Gradients(dx.flatten(0, 1).to(x.dtype), dweight.sum(0), sum_dy.sum(0))


def _views(x: Tensor, mask: Tensor | None, num_groups: int) -> tuple[Tensor, Tensor | None]:
    # (G, n, C, *S) and (G, n, 1, *S); both are views in any memory format
    view_mask = None if mask is None else mask.unflatten(0, (num_groups, -1)).unsqueeze(2)
    return x.unflatten(0, (num_groups, -1)), view_mask


def _element_dims(view: Tensor) -> list[int]:
    return [1, *range(3, view.ndim)]


def _center(view: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Moments]:
    """x less a shift near its channel means, how far the shift is off, and the moments.

    Sums of the shifted values do not suffer from a large mean, and the drift makes up for a shift that is only
    near: so a part of the examples will do for it. That part's mean is within sqrt(8) standard deviations.
    """
    dtype = torch.promote_types(view.dtype, torch.float32)
    dims = _element_dims(view)
    if mask is None:
        elements = view.shape[1] * view.shape[3:].numel()
        count = torch.full((view.shape[0], 1), float(elements), dtype=dtype, device=view.device)
        shift = view[:, : max(1, view.shape[1] // 8)].mean(dims, dtype=dtype)
        centered = view - _expand(shift, view.ndim)
    else:
        count = mask.sum(dims).to(dtype)
        shift = view.where(mask, 0).sum(dims, dtype=dtype) / count.clamp(min=1)
        centered = (view - _expand(shift, view.ndim)).where(mask, 0)
    total, squares = sum_and_dot(centered, centered, dims)
    drift = total / count.clamp(min=1)
    var = (squares / count.clamp(min=1) - drift.square()).clamp(min=0)
    return centered, drift, Moments(shift + drift, var, count)


def _apply(centered: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    # gamma and beta are folded into the per-channel numbers, (G, C)
    if weight is not None:
        scale, shift = scale * weight.to(scale.dtype), shift * weight.to(scale.dtype)
    if bias is not None:
        shift = shift + bias.to(scale.dtype)
    return _scale_shift(centered, _expand(scale, centered.ndim), _expand(shift, centered.ndim))


def _scale_shift(tensor: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return tensor * scale + shift
    return scale_shift_(tensor, scale, shift)


def _expand(per_channel: Tensor, ndim: int) -> Tensor:
    # (G, C) -> (G, 1, C, 1, ...)
    return per_channel[(slice(None), None, ...) + (None,) * (ndim - 3)]


def _spread(per_group: Tensor, k: int) -> Tensor:
    # (G, K) -> (G, C)
    return per_group if k == 1 else per_group.repeat_interleave(k, 1)


def _collect(per_channel: Tensor, k: int) -> Tensor:
    # (G, C) -> (G, K), summed
    return per_channel if k == 1 else per_channel.unflatten(1, (-1, k)).sum(2)
