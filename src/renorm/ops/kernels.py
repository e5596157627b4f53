"""Training forward and backward as one operation each, with activation and residual: the kernels' side of torch.

Eager code goes through an autograd.Function, which costs half of what a registered operation's autograd does; the
compiler and torch.export see the registered operations, with their shapes and their gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..activation import Activation, derivative_from_output, is_piecewise_linear
from ..grouping import Grouping
from ..moments import Moments
from . import schema  # noqa: F401  # defines the operations
from .composed import compose, finish
from .problem import Correction, Running

# Coefficients that the kernels return beside the moments: this many rows, among them r and d.
_ROWS, _R, _D = 6, 3, 4


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
    """`ops.normalize.normalize` by the kernels.

    Args:
        x: input, (N, C, *S), not empty, that `suits_kernels`.
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
    settings = (
        running[0], running[1], _as_tensor(running[2]), _as_tensor(running[3]), given[0], given[1],
        grouping.examples_per_group, grouping.channels_per_group, eps, act or "none",
    )  # fmt: skip
    if torch.compiler.is_compiling():
        y, mean, var, count, _ = torch.ops.renorm.normalize.default(x, weight, bias, mask, residual, *settings)
    else:
        y, mean, var, count, _ = _Fused.apply(x, weight, bias, residual, mask, settings)
    return y, Moments(mean, var, count)


def normalize_and_track(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    limits: tuple[float | Tensor, float | Tensor] | None,
    grouping: Grouping,
    eps: float,
    act: Activation | None,
    tracking: str,
    momentum: float | None,
) -> Tensor:
    """A layer's training step in eager mode: `normalize`, and the running statistics move.

    Args:
        x: input, (N, C, *S), not empty, that `suits_kernels`.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        mask: True where an element counts, (N, *S), or None.
        residual: added before the activation, shape and dtype of x, or None.
        state: running mean, running variance and both counters, all moved in place.
        limits: of the correction towards the running statistics; None for batch norm.
        grouping: which elements share statistics.
        eps: added to the variance.
        act: activation, or None.
        tracking: rule by which the running statistics move.
        momentum: weight of the batch; None for the cumulative average.

    Returns:
        The output.
    """
    r_max, d_max = (None, None) if limits is None else map(_as_tensor, limits)
    settings = (
        *state, r_max, d_max, grouping.examples_per_group, grouping.channels_per_group, eps, act or "none", tracking,
        momentum,
    )  # fmt: skip
    y: Tensor = _FusedStep.apply(x, weight, bias, residual, mask, settings)
    torch.autograd.graph.increment_version(state)
    return y


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
    y, mean, var, count, coefficients = output
    ctx.mark_non_differentiable(mean, var, count, coefficients)
    _keep(ctx, inputs[:5], y, count, coefficients, inputs[-4:])


def _keep(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    y: Tensor,
    count: Tensor,
    coefficients: Tensor,
    settings: tuple[Any, ...],
) -> None:
    x, weight, bias, mask, residual = inputs
    ctx.examples_per_group, ctx.channels_per_group, ctx.eps, ctx.act = settings
    ctx.set_materialize_grads(False)  # no zeros for the outputs that have no gradient
    # The activation's gradient is computed from x again; with a residual, a piecewise linear one's from y, which
    # whatever comes next keeps anyhow.
    kept_y = y if residual is not None and is_piecewise_linear(ctx.act) else None
    kept_residual = residual if residual is not None and kept_y is None and ctx.act != "none" else None
    ctx.save_for_backward(x, weight, bias, mask, kept_residual, kept_y, count, coefficients)


# Which of x, weight, bias and residual want a gradient, and these gradients.
_Wanted = tuple[bool, bool, bool, bool]
_Found = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _gradients(ctx: Any, dy: Tensor | None, wanted: _Wanted) -> _Found:
    if dy is None:
        return None, None, None, None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _differentiable_gradients(ctx, dy, wanted)
    x, weight, _, mask, residual, y, count, coefficients = ctx.saved_tensors
    _, wants_weight, wants_bias, wants_residual = wanted
    is_dy = ctx.act == "none" and mask is None  # what the residual gets
    dx, dweight, dbias, dresidual = torch.ops.renorm.normalize_backward.default(
        dy, x, weight, mask, residual, y, count, coefficients,
        ctx.examples_per_group, ctx.channels_per_group, ctx.act, wants_residual and not is_dy,
    )  # fmt: skip
    return (
        dx,
        dweight if wants_weight else None,
        dbias if wants_bias else None,
        (dy if is_dy else dresidual) if wants_residual else None,
    )


def _differentiable_gradients(ctx: Any, dy: Tensor, wanted: _Wanted) -> _Found:
    """The gradients by torch's own operations, for a second backward."""
    x, weight, bias, mask, residual, y, _, coefficients = ctx.saved_tensors
    k = ctx.channels_per_group
    correction = Correction(coefficients[_R, :, ::k], coefficients[_D, :, ::k])
    normalized, _ = compose(x, weight, bias, mask, correction, Grouping(ctx.examples_per_group, k), ctx.eps)
    if y is None:
        output = finish(normalized, mask, residual, None if ctx.act == "none" else ctx.act)
        slope = None
    else:
        slope = derivative_from_output(y, ctx.act)
        output = normalized * slope
    tensors = (x, weight, bias, residual)
    indices = [i for i, tensor in enumerate(tensors) if tensor is not None and wanted[i]]
    found = torch.autograd.grad(output, [tensors[i] for i in indices], dy, create_graph=True)
    gradients = dict(zip(indices, found, strict=True))
    if wanted[3] and residual is None:
        dresidual = dy if slope is None else dy * slope
        gradients[3] = dresidual if mask is None else dresidual.where(mask.unsqueeze(1), 0)
    return gradients.get(0), gradients.get(1), gradients.get(2), gradients.get(3)


class _Fused(torch.autograd.Function):
    # One forward with ctx, not setup_context, and few arguments: both cost as much as a small layer's kernel. The
    # price is torch.func, whose transforms take the composed operation.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        settings: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        inputs = (x, weight, bias, mask, residual, *settings)
        output: tuple[Tensor, ...] = torch.ops.renorm.normalize_eager.default(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, ctx.needs_input_grad[:4]), None, None


class _FusedStep(_Fused):
    # Its statistics are no outputs: autograd would have to be told about each of them.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        settings: tuple[Any, ...],
    ) -> Any:
        inputs = (x, weight, bias, mask, residual)
        y, count, coefficients = torch.ops.renorm.normalize_and_track.default(*inputs, *settings)
        _keep(ctx, inputs, y, count, coefficients, settings[6:10])
        return y


def _output_like(x: Tensor) -> Tensor:
    # The kernels keep both dense layouts, and copy whatever else comes.
    return torch.empty_like(x) if _is_dense(x) else torch.empty_like(x, memory_format=torch.contiguous_format)


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def _register() -> None:
    def normalized(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        examples_per_group, channels_per_group = arguments[10:12]
        groups = sum(number for number, _ in Grouping(examples_per_group, channels_per_group).parts(x.shape[0]))
        wide, channels = torch.promote_types(x.dtype, torch.float32), x.shape[1]

        def statistic(*shape: int) -> Tensor:
            return x.new_empty(shape, dtype=wide)

        moments = statistic(groups, channels), statistic(groups, channels), statistic(groups, 1)
        return _output_like(x), *moments, statistic(_ROWS, groups, channels)

    def differentiated(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        wide, wants_residual = torch.promote_types(x.dtype, torch.float32), arguments[-1]
        parameter = [x.new_empty(x.shape[1], dtype=wide) for _ in range(2)]
        return _output_like(x), *parameter, _output_like(x) if wants_residual else x.new_empty(0)

    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        wants_x, wants_weight, wants_bias, _, wants_residual, *rest = ctx.needs_input_grad
        dx, dweight, dbias, dresidual = _gradients(ctx, dy, (wants_x, wants_weight, wants_bias, wants_residual))
        return dx, dweight, dbias, None, dresidual, *(None for _ in rest)

    torch.library.register_fake("renorm::normalize", normalized)
    torch.library.register_fake("renorm::normalize_backward", differentiated)
    torch.library.register_autograd("renorm::normalize", backward, setup_context=_save)


_register()
