"""Batch (re)normalization in plain PyTorch: the definition that every other backend is tested against.

Shapes in comments: N examples, C channels and positions *S; G example groups of n examples, K channel groups
of k channels. Big tensors are viewed as (G, n, C, *S). Everything else is one number per group, and so are the
correction's r and d: they never cost a pass over the data.

Names beside Ioffe 2017, algorithm 1: `group.mean` is mu_B and `sigma` is sigma_B; `centered` is x - mu_B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..grouping import Run
from ..moments import Moments
from .problem import Correction, Gradients, Implementation, Inputs, Normalized, Settings, Target
from .statistics import (
    apply,
    center,
    collect,
    correct,
    element_dims,
    expand,
    merge_channels,
    scale_shift,
    spread,
    views,
)


def forward(inputs: Inputs, settings: Settings, correction: Target | Correction | None) -> Normalized:
    """Training forward: normalize every group by its own moments, then correct by r and d.

    Args:
        inputs: x, not empty, (N, C, *S), with gamma, beta and mask; the residual is not added.
        settings: grouping and eps; the activation is not applied.
        correction: what r and d are computed from, or r and d themselves; None for batch norm (r = 1, d = 0).

    Returns:
        The output, the moments, and r and d.
    """
    parts = settings.grouping.parts(inputs.x.shape[0])
    if len(parts) == 1:  # asked before there are slices, which would fix a compiled batch size
        return _forward(inputs, settings, correction, parts[0][0])
    runs = settings.grouping.runs(inputs.x.shape[0])
    pieces = [_forward(_of(run, inputs), settings, _of_groups(run, correction), run.number) for run in runs]
    corrections = [piece.correction for piece in pieces if piece.correction is not None]
    return Normalized(
        torch.cat([piece.y for piece in pieces]),
        Moments(*map(torch.cat, zip(*(piece.moments for piece in pieces), strict=True))),
        Correction(*map(torch.cat, zip(*corrections, strict=True))) if corrections else None,
    )


def backward(
    dy: Tensor, inputs: Inputs, settings: Settings, moments: Moments, correction: Correction | None
) -> Gradients:
    """Gradients of `forward`, in closed form; differentiable once more where grad mode is on.

    With g = dL/dx_hat and z = (x - mu_B) / sigma_B over the m elements of a group (P1, section 3):
    dL/dx = r / sigma_B * (g - mean(g) - z * mean(g * z)).

    Args:
        dy: gradient of the output, (N, C, *S).
        inputs: those of the forward.
        settings: those of the forward.
        moments: moments of the forward, (G, C).
        correction: r and d of the forward.

    Returns:
        The gradients of x, weight and bias.
    """
    if len(settings.grouping.parts(inputs.x.shape[0])) == 1:
        return _backward(dy, inputs, settings, moments, correction)
    pieces = [
        _backward(
            dy[run.examples], _of(run, inputs), settings, Moments(*(moment[run.groups] for moment in moments)),
            None if correction is None else Correction(correction.r[run.groups], correction.d[run.groups]),
        )
        for run in settings.grouping.runs(inputs.x.shape[0])
    ]  # fmt: skip
    dx, dweight, dbias = zip(*pieces, strict=True)
    return Gradients(torch.cat(dx), sum(dweight[1:], dweight[0]), sum(dbias[1:], dbias[0]))


DEFINITION = Implementation(forward, backward)


def _of(run: Run, inputs: Inputs) -> Inputs:
    x, weight, bias, mask, residual = inputs
    return Inputs(x[run.examples], weight, bias, None if mask is None else mask[run.examples], residual)


def _of_groups(run: Run, correction: Target | Correction | None) -> Target | Correction | None:
    if not isinstance(correction, Correction):
        return correction
    return Correction(correction.r[run.groups], correction.d[run.groups])


def _forward(inputs: Inputs, settings: Settings, correction: Target | Correction | None, num_groups: int) -> Normalized:
    x, weight, bias, mask, _ = inputs
    k, eps = settings.grouping.channels_per_group, settings.eps
    view, view_mask = views(x, mask, num_groups)
    centered, drift, channel = center(view, view_mask)
    group = merge_channels(channel, k)
    if isinstance(correction, Target):
        correction = Correction(*(number.detach() for number in correct(group, correction, k, eps)))
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
    y = _merged(y, x.shape)
    return Normalized(y if y.dtype == x.dtype else y.to(x.dtype), channel, correction)


def _backward(
    dy: Tensor, inputs: Inputs, settings: Settings, channel: Moments, correction: Correction | None
) -> Gradients:
    x, weight, _, mask, _ = inputs
    k, eps, num_groups = settings.grouping.channels_per_group, settings.eps, channel.mean.shape[0]
    view, view_mask = views(x, mask, num_groups)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        channel = center(view, view_mask)[2]  # a second backward must see how the moments depend on x
    group = merge_channels(channel, k)
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
