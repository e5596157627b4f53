"""Training forward and backward by torch's own operations: one differentiable operation, and what may follow it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..activation import activate
from ..moments import Moments
from . import reference
from .problem import Correction, Implementation, Inputs, Settings, Target


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
    x, weight, bias, mask, _ = inputs
    y, mean, var, count, *_ = _ByTorch.apply(x, weight, bias, mask, correction, settings, implementation)
    return finish(y, inputs, settings), Moments(mean, var, count)


def finish(y: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Add the residual and activate, by torch's own operations.

    Args:
        y: normalized, (N, C, *S), 0 where masked.
        inputs: with the mask, (N, *S), and the residual.
        settings: with the activation.

    Returns:
        The output, dtype of y, 0 where masked.
    """
    mask, residual = inputs.mask, inputs.residual
    if residual is not None:
        residual = residual if mask is None else residual.where(mask.unsqueeze(1), 0)
        y = (y + residual).to(y.dtype)
    return activate(y, settings.act)


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
