"""Training forward and backward as one operation each, with activation and residual: the C++ kernels' side of torch.

Eager code goes through an autograd.Function, which costs half of what a registered operation's autograd does; the
compiler and torch.export see the registered operations, with their shapes and their gradient.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..activation import Activation, activate, derivative_from_output, is_piecewise_linear
from ..grouping import Grouping
from ..moments import Moments
from . import extension
from .composed import compose
from .types import Correction, Running

# Rows of the coefficients that the kernels return beside the moments.
_R, _D = 3, 4


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    correction: Running | Correction | None,
    grouping: Grouping,
    eps: float,
    act: Activation | None,
) -> tuple[Tensor, Moments]:
    """`ops.normalize.normalize` by the C++ kernels.

    Args:
        x: input, (N, C, *S), not empty, as `extension.suits` wants it.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        mask: True where an element counts, (N, *S), or None.
        residual: added before the activation, shape and dtype of x, or None.
        correction: what r and d are computed from, or r and d themselves; None for batch norm.
        grouping: which elements share statistics.
        eps: added to the variance.
        act: activation, or None.

    Returns:
        The output and the moments.
    """
    running = correction if isinstance(correction, Running) else _NOTHING
    given = correction if isinstance(correction, Correction) else _NOTHING
    operation = torch.ops.renorm.normalize if torch.compiler.is_compiling() else _Fused.apply
    y, mean, var, count, _ = operation(
        x, weight, bias, mask, residual, running[0], running[1], _as_tensor(running[2]), _as_tensor(running[3]),
        given[0], given[1], grouping.examples_per_group, grouping.channels_per_group, eps, act or "none",
    )  # fmt: skip
    return y, Moments(mean, var, count)


_NOTHING = (None, None, None, None)


def _as_tensor(limit: float | Tensor | None) -> Tensor | None:
    if limit is None or isinstance(limit, Tensor):
        return limit
    return torch.tensor(limit, dtype=torch.float64) if torch.compiler.is_compiling() else _constant(limit)


@lru_cache(maxsize=64)
def _constant(value: float) -> Tensor:
    # All layers have the same limits at a step, and a tensor costs more than finding it.
    return torch.tensor(value, dtype=torch.float64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, mask, residual, *_, ctx.examples_per_group, ctx.channels_per_group, ctx.eps, ctx.act = inputs
    y, mean, var, count, coefficients = output
    # The activation's gradient is computed from x again; with a residual, a piecewise linear one's from y, which
    # whatever comes next keeps anyhow.
    kept_y = y if residual is not None and is_piecewise_linear(ctx.act) else None
    kept_residual = residual if residual is not None and kept_y is None and ctx.act != "none" else None
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, weight, bias, mask, kept_residual, kept_y, mean, var, count, coefficients)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mask, residual, y, mean, var, count, coefficients = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _differentiable_gradients(ctx, dy)
    wants_residual = ctx.has_residual and ctx.needs_input_grad[4]
    needs_pass = wants_residual and (ctx.act != "none" or mask is not None)
    dx, dweight, dbias, dresidual = torch.ops.renorm.normalize_backward.default(
        dy, x, weight, mask, residual, y, count, coefficients,
        ctx.examples_per_group, ctx.channels_per_group, ctx.act, needs_pass,
    )  # fmt: skip
    if wants_residual and not needs_pass:
        dresidual = dy
    return (
        dx,
        dweight if ctx.needs_input_grad[1] else None,
        dbias if ctx.needs_input_grad[2] else None,
        None,
        dresidual if wants_residual else None,
        *_NO_GRADIENTS,
    )


_NO_GRADIENTS = (None,) * 10


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by plain operations, for a second backward."""
    x, weight, bias, mask, residual, y, _, _, _, coefficients = ctx.saved_tensors
    k = ctx.channels_per_group
    correction = Correction(coefficients[_R, :, ::k], coefficients[_D, :, ::k])
    normalized, _ = compose(x, weight, bias, mask, correction, Grouping(ctx.examples_per_group, k), ctx.eps)
    if y is None:
        slope = None
        output = activate(normalized if residual is None else normalized + residual, None if ctx.act == "none" else ctx.act)
    else:
        slope = derivative_from_output(y, ctx.act)
        output = normalized * slope
    named = {0: x, 1: weight, 2: bias, 4: residual}
    wanted = [i for i, tensor in named.items() if tensor is not None and ctx.needs_input_grad[i]]
    found = torch.autograd.grad(output, [named[i] for i in wanted], dy, create_graph=True)
    gradients: list[Tensor | None] = [None] * 15
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    if ctx.has_residual and residual is None and ctx.needs_input_grad[4]:
        gradients[4] = dy if slope is None else dy * slope
    if gradients[4] is not None and mask is not None:
        gradients[4] = gradients[4].where(mask.unsqueeze(1), 0)
    return tuple(gradients)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        r_max: Tensor | None,
        d_max: Tensor | None,
        r: Tensor | None,
        d: Tensor | None,
        examples_per_group: int | None,
        channels_per_group: int,
        eps: float,
        act: str,
    ) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = torch.ops.renorm.normalize.default(
            x, weight, bias, mask, residual, running_mean, running_var, r_max, d_max, r, d,
            examples_per_group, channels_per_group, eps, act,
        )  # fmt: skip
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy)


# Autograd asks for the signature at every call; to find it anew takes longer than all else around the operation.
_Fused.forward.__signature__ = inspect.signature(_Fused.forward)  # type: ignore[attr-defined]


def _output_like(x: Tensor) -> Tensor:
    # The kernels keep both dense layouts, and copy whatever else comes.
    return torch.empty_like(x) if _is_dense(x) else torch.empty_like(x, memory_format=torch.contiguous_format)


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def _register() -> None:
    @torch.library.register_fake("renorm::normalize")
    def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        examples_per_group, channels_per_group = arguments[10:12]
        groups = sum(number for number, _ in Grouping(examples_per_group, channels_per_group).parts(x.shape[0]))
        wide, channels = torch.promote_types(x.dtype, torch.float32), x.shape[1]

        def statistic(*shape: int) -> Tensor:
            return x.new_empty(shape, dtype=wide)

        moments = statistic(groups, channels), statistic(groups, channels), statistic(groups, 1)
        return _output_like(x), *moments, statistic(6, groups, channels)

    @torch.library.register_fake("renorm::normalize_backward")
    def _(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        wide, wants_residual = torch.promote_types(x.dtype, torch.float32), arguments[-1]
        parameter = [x.new_empty(x.shape[1], dtype=wide) for _ in range(2)]
        return _output_like(x), *parameter, _output_like(x) if wants_residual else x.new_empty(0)

    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy)

    torch.library.register_autograd("renorm::normalize", backward, setup_context=_save_registered)


def _save_registered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output)


if extension.available():
    _register()
