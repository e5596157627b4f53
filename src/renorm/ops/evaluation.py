"""Evaluation: by the running statistics, weighed with those of each example by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activation import Activation
from .composed import finish
from .normalize import suits_kernels
from .statistics import pool_running


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
    if torch.compiler.is_compiling() or torch.jit._trace.is_tracing():  # what is exported must run where we are not
        return False
    if x.numel() == 0 or not suits_kernels(x, residual):
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
    weight, bias = (None if p is None else _as(running_mean.dtype, p) for p in (weight, bias))
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
    view = _as(running_var.dtype, x).unflatten(1, (-1, k))  # (N, K, k, *S)
    dims = list(range(2, view.ndim))
    counted = None if mask is None else mask[:, None, None]
    mean, centered = _centered(view, counted, dims)
    var = _mean(centered.square(), counted, dims)
    alpha = example_weight if counted is None else counted.any(dims, keepdim=True).to(var.dtype) * example_weight
    if k > 1:
        running_mean, running_var, _ = pool_running(running_mean, running_var, k)
    running_mean, running_var = (t.view(-1, *[1] * len(dims)) for t in (running_mean, running_var))  # (K, 1, ...)
    difference = mean - running_mean
    var = (1 - alpha) * running_var + alpha * var + alpha * (1 - alpha) * difference.square()
    scale = (var + eps).rsqrt()
    shift = (1 - alpha) * difference * scale
    if weight is not None:
        gamma = _as(scale.dtype, weight).view(-1, k, *[1] * (len(dims) - 1))  # (K, k, 1, ...)
        scale, shift = scale * gamma, shift * gamma
    if bias is not None:
        shift = shift + _as(scale.dtype, bias).view(-1, k, *[1] * (len(dims) - 1))
    y = centered * scale + shift
    if counted is not None:
        y = y.where(counted, 0)
    return _as(x.dtype, y.flatten(1, 2))


def _centered(view: Tensor, counted: Tensor | None, dims: list[int]) -> tuple[Tensor, Tensor]:
    mean = _mean(view if counted is None else view.where(counted, 0), counted, dims)
    centered = view - mean
    return mean, centered if counted is None else centered.where(counted, 0)


def _mean(values: Tensor, counted: Tensor | None, dims: list[int]) -> Tensor:
    """Mean over the counted elements of every example's channel group; the others are 0."""
    if counted is None:
        return values.mean(dims, keepdim=True)
    count = counted.sum(dims, keepdim=True) * values.shape[2]
    return values.sum(dims, keepdim=True) / count.clamp(min=1)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # a cast to its own dtype would hide a parameter from what folds exported graphs
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
