"""Training forward and backward by torch's own operations: one differentiable operation, and what may follow it."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..activation import Activation, activate
from ..grouping import Grouping
from ..moments import Moments
from . import aten, aten_gpu, reference
from .problem import Correction, Running


def compose(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    correction: Running | Correction | None,
    grouping: Grouping,
    eps: float,
) -> tuple[Tensor, Moments]:
    """Normalize by `reference.forward`, with its closed-form gradient; differentiable twice.

    Args:
        x: input, (N, C, *S), not empty.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        mask: True where an element counts, (N, *S), or None.
        correction: what r and d are computed from, or r and d themselves; None for batch norm.
        grouping: which elements share statistics.
        eps: added to the variance.

    Returns:
        The output and the moments, which are constants for autograd.
    """
    y, mean, var, count, *_ = _Normalize.apply(x, weight, bias, mask, correction, grouping, eps)
    return y, Moments(mean, var, count)


def finish(y: Tensor, mask: Tensor | None, residual: Tensor | None, act: Activation | None) -> Tensor:
    """Add the residual and activate, by torch's own operations.

    Args:
        y: normalized, (N, C, *S), 0 where masked.
        mask: True where an element counts, (N, *S), or None.
        residual: shape of y, or None.
        act: activation, or None.

    Returns:
        The output, dtype of y, 0 where masked.
    """
    if residual is not None:
        residual = residual if mask is None else residual.where(mask.unsqueeze(1), 0)
        y = (y + residual).to(y.dtype)
    return activate(y, act)


def _torch_kernels(x: Tensor, mask: Tensor | None, grouping: Grouping) -> ModuleType | None:
    return next((module for module in (aten, aten_gpu) if module.suits(x, mask, grouping)), None)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        correction: Running | Correction | None,
        grouping: Grouping,
        eps: float,
    ) -> tuple[Tensor, ...]:
        torch_kernels = _torch_kernels(x, mask, grouping)
        if torch_kernels is not None:
            y, moments, applied = torch_kernels.forward(x, weight, bias, correction, eps)
        else:
            y, moments, applied = reference.forward(x, weight, bias, mask, correction, grouping, eps)
        return y, *moments, *(applied or ())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, _, mask, _, ctx.grouping, ctx.eps = inputs
        statistics = output[1:]
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(x, weight, mask, *statistics)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, mean, var, count, *applied = ctx.saved_tensors
        moments, correction = Moments(mean, var, count), Correction(*applied) if applied else None
        torch_kernels = _torch_kernels(x, mask, ctx.grouping)
        if torch_kernels is not None:
            gradients = torch_kernels.backward(dy, x, weight, moments, correction, ctx.eps)
        else:
            gradients = reference.backward(dy, x, weight, mask, moments, correction, ctx.grouping, ctx.eps)
        _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        dweight = gradients.weight if wants_weight else None
        dbias = gradients.bias if wants_bias else None
        return gradients.x, dweight, dbias, None, None, None, None


# Autograd asks for the signature at every call; to find it anew takes longer than all else around the operation.
_Normalize.forward.__signature__ = inspect.signature(_Normalize.forward)  # type: ignore[attr-defined]
