"""Normalization by the statistics of all workers' batches, as nn.SyncBatchNorm does, with the correction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_channels
from ..moments import Moments, accumulation_dtype
from ..ops import statistics
from ..ops.composed import finish
from ..ops.problem import Inputs, Settings, Target, checked
from ..transforms import snapshot
from .group import Workers


def normalize_over_workers(
    inputs: Inputs, settings: Settings, target: Target | None, workers: Workers
) -> tuple[Tensor, Moments, Tensor]:
    """Normalize a local batch by the statistics of all workers; every worker must call it, in forward and backward.

    Args:
        inputs: the local batch; its size may differ between workers, and be 0.
        settings: channels_per_group, eps and activation; examples are not cut into groups.
        target: what to correct towards; None for batch norm.
        workers: that share statistics.

    Returns:
        The output; the moments of all workers' examples, (1, C), constants for autograd; and how many workers were
        left out because their moments were not finite.

    Raises:
        TypeError: x is not floating point, or the mask not boolean.
        ValueError: a shape does not fit.
    """
    inputs = checked(inputs, settings, target)
    x, weight, bias, mask, _ = inputs
    check_channels(x.shape[1], settings.grouping.channels_per_group)
    y, mean, var, count, left_out = _OverWorkers.apply(x, weight, bias, mask, settings, target, workers)
    return finish(y, inputs, settings), Moments(mean, var, count), left_out


class _OverWorkers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        settings: Settings,
        target: Target | None,
        workers: Workers,
    ) -> tuple[Tensor, ...]:
        k, eps = settings.grouping.channels_per_group, settings.eps
        moments, is_finite, left_out = _merge(_local_moments(x, mask), workers)
        group = statistics.merge_channels(moments, k)  # (1, K)
        mean, sigma = (statistics.spread(part, k) for part in (group.mean, (group.var + eps).sqrt()))
        r, d = torch.ones_like(sigma), torch.zeros_like(sigma)
        if target is not None:
            r, d = (snapshot(statistics.spread(part, k)) for part in statistics.correct(group, target, k, eps))
        scale, shift = r / sigma, d  # (1, C)
        if weight is not None:
            scale, shift = scale * weight, shift * weight
        if bias is not None:
            shift = shift + bias
        y = _kept(_less(x, mean).mul_(_expand(scale, x)).add_(_expand(shift, x)).to(x.dtype), mask)
        ctx.save_for_backward(x, weight, mask, mean, 1 / sigma, r, d, group.count, is_finite)
        ctx.k, ctx.workers = k, workers
        ctx.mark_non_differentiable(*moments, left_out)
        ctx.set_materialize_grads(False)
        return y, *moments, left_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, mask, mean, inverse, r, d, count, is_finite = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else _kept(dy, mask)  # the other workers wait for the sums
        dy = dy.to(mean.dtype)
        z = _kept(_less(x, mean), mask) * _expand(inverse, x)
        dims = [0, *range(2, x.ndim)]
        sums = torch.stack((dy.sum(dims), (dy * z).sum(dims)))  # (2, C)
        dbias, dweight = sums[0], sums[1] * r[0] + sums[0] * d[0]
        gamma = torch.ones_like(mean) if weight is None else weight[None].to(mean.dtype)
        # A worker that was left out of the statistics has no part in their gradient.
        over_groups = statistics.collect((sums * gamma).where(is_finite, 0), ctx.k)  # (2, K)
        over_groups = ctx.workers.sum(over_groups) / count.clamp(min=1)
        mean_g, mean_gz = (_expand(statistics.spread(part[None], ctx.k), x) for part in over_groups)
        dx = (dy * _expand(gamma, x) - mean_g - z * mean_gz) * _expand(r * inverse, x)
        wants_weight, wants_bias = ctx.needs_input_grad[1:3]
        return (
            _kept(dx.to(x.dtype), mask), dweight if wants_weight else None, dbias if wants_bias else None,
            None, None, None, None,
        )  # fmt: skip


def _local_moments(x: Tensor, mask: Tensor | None) -> Moments:
    if x.numel() == 0:
        nothing = x.new_zeros((1, x.shape[1]), dtype=accumulation_dtype(x.dtype))
        return Moments(nothing, nothing, nothing[:, :1])
    return statistics.center(*statistics.views(x, mask, 1))[2]


def _merge(local: Moments, workers: Workers) -> tuple[Moments, Tensor, Tensor]:
    """Moments over workers, whether this one's are in, and how many are not."""
    is_finite = local.finite()[0]
    sent = torch.cat([part.flatten() for part in (*local, is_finite[None])])
    channels = local.mean.shape[1]
    mean, var, count, finite = workers.gather(sent).split([channels, channels, 1, 1], 1)
    usable = finite > 0
    merged = Moments(mean.where(usable, 0), var.where(usable, 0), count.where(usable, 0)).merged(0)
    return Moments(*(part[None] for part in merged)), is_finite, (~usable).sum()


def _expand(per_channel: Tensor, x: Tensor) -> Tensor:
    # (1, C) -> (1, C, 1, ...)
    return per_channel[(...,) + (None,) * (x.ndim - 2)]


def _less(x: Tensor, mean: Tensor) -> Tensor:
    # in the statistics' dtype
    return x - _expand(mean, x)


def _kept(tensor: Tensor, mask: Tensor | None) -> Tensor:
    return tensor if mask is None else tensor.where(mask.unsqueeze(1), 0)
