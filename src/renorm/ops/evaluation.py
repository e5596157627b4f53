"""Evaluation: by the running statistics, weighed with those of each example by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activation import Activation
from .composed import finish
from .normalize import suits_kernels
from .statistics import apply, center, pool, pool_running, spread


def evaluate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    example_weight: float,
    channels_per_group: int,
    eps: float,
    act: Activation | None,
) -> Tensor:
    """Normalize by the running statistics, weighed with the example's own; add the residual; activate.

    Args:
        x: input, (N, C, *S).
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        mask: True where an element counts, (N, *S), or None.
        residual: added before the activation, shape of x, or None.
        running_mean: (C,), float32 at least.
        running_var: (C,), float32 at least.
        example_weight: alpha, the weight of the example's own statistics, in [0, 1].
        channels_per_group: consecutive channels that share statistics.
        eps: added to the variance.
        act: activation, or None.

    Returns:
        The output, shape and dtype of x; differentiable, through the example's own statistics too. Without any of
        mask, weighing and channel groups what is normalized is nn.BatchNorm's, bit for bit.
    """
    k = channels_per_group
    is_plain = example_weight == 0 and k == 1 and mask is None
    if not (is_plain and residual is None and act is None) and _suits_kernels(x, weight, bias, residual):
        fused: Tensor = torch.ops.renorm.evaluate.default(
            x, weight, bias, mask, residual, running_mean, running_var, example_weight, k, eps, act or "none"
        )
        return fused
    if example_weight > 0 and x.numel() > 0:
        y = _weigh(x, weight, bias, mask, running_mean, running_var, example_weight, k, eps)
    else:
        y = _by_running(x, weight, bias, mask, running_mean, running_var, k, eps)
    return finish(y, mask, residual, act)


def _suits_kernels(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or x.numel() == 0 or not suits_kernels(x, residual):
        return False
    needs_gradient = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, residual))
    return not (needs_gradient and torch.is_grad_enabled())


def _by_running(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    k: int,
    eps: float,
) -> Tensor:
    if k > 1:
        group = pool_running(running_mean, running_var, k)
        running_mean, running_var = (moment[0].repeat_interleave(k) for moment in (group.mean, group.var))
    weight, bias = (None if p is None else p.to(running_mean.dtype) for p in (weight, bias))
    if mask is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    counted = mask.unsqueeze(1)
    x = x.where(counted, 0)  # else NaN in the padding reaches the weight's gradient
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps).where(counted, 0)


def _weigh(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    example_weight: float,
    k: int,
    eps: float,
) -> Tensor:
    running = pool_running(running_mean, running_var, k)  # (1, K)
    view = x.unsqueeze(1)  # every example is a group: (G = N, 1, C, *S)
    view_mask = None if mask is None else mask[:, None, None]
    centered, drift, channel = center(view, view_mask)
    example = pool(channel, k)  # (N, K)
    alpha = example_weight if mask is None else (example.count > 0).to(running.var.dtype) * example_weight
    difference = example.mean - running.mean
    var = (1 - alpha) * running.var + alpha * example.var + alpha * (1 - alpha) * difference.square()
    # x - mean, with mean = mu + alpha * (e - mu), from the example's centered channels
    offset = channel.mean - spread(example.mean, k) - drift + spread((1 - alpha) * difference, k)
    scale = spread((var + eps).rsqrt(), k)
    y = apply(centered, scale, scale * offset, weight, bias)
    if view_mask is not None:
        y = y.where(view_mask, 0)
    return y.squeeze(1).to(x.dtype)
