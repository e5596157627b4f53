"""Training and evaluation by torch's own operations, and what may follow: residual and activation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activation import activate, is_piecewise_linear
from ..moments import Moments, accumulation_dtype
from . import reference
from .problem import Correction, Implementation, Inputs, Running, Settings, Target
from .statistics import merge_running


def compose(
    implementation: Implementation, inputs: Inputs, settings: Settings, correction: Target | Correction | None
) -> tuple[Tensor, Moments]:
    """Normalize with the gradient in closed form, differentiable twice; then add the residual and activate.

    Args:
        implementation: computes the normalization, and its gradient.
        inputs: x not empty, the mask (N, *S).
        settings: grouping, eps and activation.
        correction: what r and d are computed from, or r and d themselves; None for batch norm.

    Returns:
        The output, 0 where masked, and the moments, which are constants for autograd.
    """
    x, weight, bias, mask, residual = inputs
    narrow, wide = x.dtype, accumulation_dtype(x.dtype)
    act = settings.act
    if narrow != wide and implementation is reference.DEFINITION and (act is not None or residual is not None):
        # as the kernels, which round once: rounding in between would change slopes where they jump
        x, residual = x.to(wide), None if residual is None else residual.to(wide)
    y, mean, var, count, *_ = _ByTorch.apply(x, weight, bias, mask, correction, settings, implementation)
    y = _added(y, mask, residual)
    if residual is not None and act is not None and is_piecewise_linear(act):
        y = y.to(narrow)  # these have kept their output, and take the slope from it
    return activate(y, act).to(narrow), Moments(mean, var, count)


def evaluate(inputs: Inputs, settings: Settings, running: Running, example_weight: float) -> Tensor:
    """Evaluate by torch's own operations; see `dispatch.evaluate`."""
    if example_weight > 0 and inputs.x.numel() > 0:
        y = _weigh(inputs, settings, running, example_weight)
    else:
        y = _by_running(inputs, settings, running)
    return finish(y, inputs, settings)


def finish(y: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Add the residual and activate, by torch's own operations.

    Args:
        y: normalized, (N, C, *S), 0 where masked.
        inputs: with the mask, (N, *S), and the residual.
        settings: with the activation.

    Returns:
        The output, dtype of y, 0 where masked.
    """
    return activate(_added(y, inputs.mask, inputs.residual), settings.act)


def _added(y: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
    if residual is None:
        return y
    return (y + (residual if mask is None else residual.where(mask.unsqueeze(1), 0))).to(y.dtype)


class _ByTorch(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        correction: Target | Correction | None,
        settings: Settings,
        implementation: Implementation,
    ) -> tuple[Tensor, ...]:
        y, moments, applied = implementation.forward(Inputs(x, weight, bias, mask), settings, correction)
        return y, *moments, *(applied or ())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, _, mask, _, ctx.settings, ctx.implementation = inputs
        statistics = output[1:]
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(x, weight, mask, *statistics)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, mean, var, count, *applied = ctx.saved_tensors
        moments, correction = Moments(mean, var, count), Correction(*applied) if applied else None
        # a second backward must see how the moments depend on x, which the definition alone shows it
        implementation = reference.DEFINITION if torch.is_grad_enabled() else ctx.implementation
        gradients = implementation.backward(dy, Inputs(x, weight, None, mask), ctx.settings, moments, correction)
        _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        dweight = gradients.weight if wants_weight else None
        dbias = gradients.bias if wants_bias else None
        return gradients.x, dweight, dbias, None, None, None, None


# Autograd asks for the signature at every call; to find it anew takes longer than all else around the operation.
_ByTorch.forward.__signature__ = inspect.signature(_ByTorch.forward)  # type: ignore[attr-defined]


def _by_running(inputs: Inputs, settings: Settings, running: Running) -> Tensor:
    (x, weight, bias, mask, _), (running_mean, running_var) = inputs, running
    k, eps = settings.grouping.channels_per_group, settings.eps
    if k > 1:
        group = merge_running(running_mean, running_var, k)
        running_mean, running_var = (moment[0].repeat_interleave(k) for moment in (group.mean, group.var))
    weight, bias = (None if p is None else _as(running_mean.dtype, p) for p in (weight, bias))
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()  # torch's backward reads a strided one as if it were
    if mask is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    counted = mask.unsqueeze(1)
    x = x.where(counted, 0)  # else NaN in the padding reaches the weight's gradient
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps).where(counted, 0)


def _weigh(inputs: Inputs, settings: Settings, running: Running, example_weight: float) -> Tensor:
    (x, weight, bias, mask, _), (running_mean, running_var) = inputs, running
    k, eps = settings.grouping.channels_per_group, settings.eps
    view = _as(running_var.dtype, x).unflatten(1, (-1, k))  # (N, K, k, *S)
    dims = list(range(2, view.ndim))
    counted = None if mask is None else mask[:, None, None]
    mean, centered = _centered(view, counted, dims)
    var = _mean(centered.square(), counted, dims)
    alpha = example_weight if counted is None else counted.any(dims, keepdim=True).to(var.dtype) * example_weight
    if k > 1:
        running_mean, running_var, _ = merge_running(running_mean, running_var, k)
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
