"""Training forward and backward as one operation each, with activation and residual: the kernels' side of torch.

Eager code goes through an autograd.Function, which costs half of what a registered operation's autograd does; the
compiler and torch.export see the registered operations, with their shapes and their gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..activation import Activation, derivative_from_output, is_piecewise_linear
from ..limits import Limits
from ..moments import Moments, accumulation_dtype
from . import reference
from .backends import give_up, is_watched
from .composed import compose, finish
from .problem import Correction, Given, Inputs, LaunchError, Running, RunningState, Settings, Target
from .schema import BackwardArguments, Coefficients, EvaluateArguments, NormalizeArguments, Saved, TrackArguments
from .tracking import Rule

_OPS = torch.ops.renorm


def normalize(inputs: Inputs, settings: Settings, correction: Target | Correction | None) -> tuple[Tensor, Moments]:
    """Normalize a batch; see `dispatch.normalize`.

    Args:
        inputs: x not empty, all that the kernels take, the mask (N, *S).
        settings: grouping, eps and activation.
        correction: what r and d are computed from, or r and d themselves; None for batch norm.

    Returns:
        The output and the moments.
    """
    if torch.compiler.is_compiling():
        arguments = NormalizeArguments.of(inputs, settings, correction)
        y, mean, var, count, _ = _OPS.normalize.default(*arguments)
    else:
        y, mean, var, count, _ = _ByKernels.apply(*inputs, settings, correction)
    return y, Moments(mean, var, count)


class Kind(Protocol):
    """Kernels for steps of a kind, as `kind_of_step` of their module makes them."""

    def step(
        self, inputs: Given, settings: Settings, state: RunningState, limits: Limits | None
    ) -> tuple[Tensor, Tensor, Any]:
        """The output, a buffer of what is kept, and a plan, which reads it by `count` and `coefficients`."""
        ...

    def backward(
        self, dy: Tensor, saved: Sequence[Tensor | None], plan: Any, settings: Settings, wants_residual: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of x, weight, bias and residual, from x, weight, mask, residual, y and what was kept."""
        ...


# One argument, since each costs autograd half a microsecond.
Step = tuple[Kind, Settings, RunningState, "Limits | None"]


def step(inputs: Inputs, step: Step) -> Tensor:
    """A layer's training step in eager mode: `normalize`, and the running statistics move, in place.

    Args:
        inputs: x not empty, all that the plan is for, the mask (N, *S).
        step: kind of the step, settings, the layer's buffers, and the limits of the correction towards them; None for
            batch norm.

    Returns:
        The output.
    """
    y: Tensor = _apply_step(*inputs, step)
    _, _, state, _ = step
    torch.autograd.graph.increment_version(state)
    return y


def evaluate(inputs: Inputs, settings: Settings, running: Running, example_weight: float) -> Tensor:
    """Evaluate without gradients; see `dispatch.evaluate`."""
    y: Tensor = _OPS.evaluate.default(*EvaluateArguments.of(inputs, settings, running, example_weight))
    return y


def track(state: RunningState, moments: Moments, rule: Rule, settings: Settings) -> None:
    """Move running statistics; see `dispatch.track`."""
    _OPS.track.default(*TrackArguments.of(state, moments, rule, settings))
    torch.autograd.graph.increment_version(state)


def _save(ctx: Any, inputs: Inputs, settings: Settings, y: Tensor, count: Tensor, coefficients: Tensor) -> None:
    x, weight, bias, mask, residual = inputs
    ctx.settings, act = settings, settings.act
    ctx.set_materialize_grads(False)  # no zeros for the outputs that have no gradient
    kept_residual, kept_y = _kept_for_activation(act, residual, y)
    ctx.save_for_backward(x, weight, bias, mask, kept_residual, kept_y, count, coefficients)


def _kept_for_activation(
    act: Activation | None, residual: Tensor | None, y: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Residual or output, whichever its gradient is computed from.

    That is from x again; with a residual, a piecewise linear one's from y, which whatever comes next keeps anyhow.
    """
    if residual is None or act is None:
        return None, None
    return (None, y) if is_piecewise_linear(act) else (residual, None)


# Which of the inputs want a gradient, and these gradients.
_Wanted = tuple[bool, bool, bool, bool, bool]
_Found = tuple[Tensor | None, Tensor | None, Tensor | None, None, Tensor | None]


def _gradients(ctx: Any, dy: Tensor | None, saved: Saved) -> _Found:
    """The gradients that are wanted: by the kernels, or, for a second backward, by torch's own operations."""
    if dy is None:
        return None, None, None, None, None
    settings = ctx.settings
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        arguments = BackwardArguments.of(dy, saved, settings, _wants_residual(ctx, saved.mask))
        try:
            found = _OPS.normalize_backward.default(*arguments)
        except LaunchError as error:
            give_up(dy.device.type, error)
        else:
            return _wanted(ctx, dy, found, saved.mask)
    with torch.enable_grad():
        return _differentiable_gradients(dy, saved, settings, ctx.needs_input_grad[:5])


def _wants_residual(ctx: Any, mask: Tensor | None) -> bool:
    """Whether the residual's gradient is wanted, and not just that of the output."""
    return ctx.needs_input_grad[4] and not (ctx.settings.act is None and mask is None)


def _wanted(ctx: Any, dy: Tensor, found: tuple[Tensor, Tensor, Tensor, Tensor | None], mask: Tensor | None) -> _Found:
    dx, dweight, dbias, dresidual = found
    _, wants_weight, wants_bias, _, wants_residual, *_ = ctx.needs_input_grad
    if not wants_residual:
        dresidual = None
    elif ctx.settings.act is None and mask is None:
        dresidual = dy
    return dx, dweight if wants_weight else None, dbias if wants_bias else None, None, dresidual


def _differentiable_gradients(dy: Tensor, saved: Saved, settings: Settings, wanted: _Wanted) -> _Found:
    """The gradients by torch's own operations, for a second backward."""
    x, weight, bias, mask, residual, y, _, coefficients = saved
    k, rows = settings.grouping.channels_per_group, Coefficients(*coefficients)
    correction = Correction(rows.r[:, ::k], rows.d[:, ::k])
    inputs = Inputs(x, weight, bias, mask, residual)
    alone = inputs._replace(residual=None), settings._replace(act=None)
    output, _ = compose(reference.DEFINITION, *alone, correction)
    slope = None
    if y is None or settings.act is None:
        output = finish(output, inputs, settings)
    else:
        slope = derivative_from_output(y, settings.act)
        output = output * slope
    asked = {i: tensor for i, tensor in enumerate(inputs) if tensor is not None and wanted[i]}
    found = torch.autograd.grad(output, list(asked.values()), dy, create_graph=True) if asked else ()
    gradients: dict[int, Any] = dict(zip(asked, found, strict=True))
    if wanted[4] and residual is None:
        dresidual = dy if slope is None else dy * slope
        gradients[4] = dresidual if mask is None else dresidual.where(mask.unsqueeze(1), 0)
    return gradients.get(0), gradients.get(1), gradients.get(2), None, gradients.get(4)


class _ByKernels(torch.autograd.Function):
    # One forward with ctx, not setup_context, and few arguments: both cost as much as a small layer's kernel. The
    # price is torch.func, whose transforms take the composed operation.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        residual: Tensor | None,
        settings: Settings,
        correction: Target | Correction | None,
    ) -> tuple[Tensor, ...]:
        inputs = Inputs(x, weight, bias, mask, residual)
        arguments = NormalizeArguments.of(inputs, settings, correction)
        output: tuple[Tensor, ...] = _OPS.normalize_eager.default(*arguments)
        y, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        _save(ctx, inputs, settings, y, *statistics[2:])
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, Saved(*ctx.saved_tensors)), None, None


class _StepByKernels(torch.autograd.Function):
    # The same past torch's dispatcher: what a forward worked out is kept for the backward, and its statistics are no
    # outputs, of which autograd would have to be told.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        residual: Tensor | None,
        step: Step,
    ) -> Any:
        kind, settings, state, limits = step
        y, kept, plan = kind.step((x, weight, bias, mask, residual), settings, state, limits)
        ctx.settings, ctx.made = settings, (kind, plan)
        ctx.set_materialize_grads(False)
        kept_residual = kept_y = None
        if residual is not None:
            kept_residual, kept_y = _kept_for_activation(settings.act, residual, y)
        ctx.save_for_backward(x, weight, bias, mask, kept_residual, kept_y, kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, mask, residual, y, kept = ctx.saved_tensors
        kind, plan = ctx.made
        if dy is not None and not (torch.is_grad_enabled() or is_watched(dy)):
            wants = _wants_residual(ctx, mask)
            try:
                found = kind.backward(dy, (x, weight, mask, residual, y, kept), plan, ctx.settings, wants)
            except LaunchError as error:
                give_up(dy.device.type, error)
            else:
                return *_wanted(ctx, dy, found, mask), None
        saved = Saved(x, weight, bias, mask, residual, y, plan.count(kept), plan.coefficients(kept))
        return *_gradients(ctx, dy, saved), None


# Past torch's own `apply`, which asks for transforms that `is_watched` has asked for, in a third of the time of it all.
_apply_step: Any = super(torch.autograd.Function, _StepByKernels).apply


def _output_like(x: Tensor) -> Tensor:
    # The kernels keep both dense layouts, and copy whatever else comes.
    is_dense = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    return torch.empty_like(x) if is_dense else torch.empty_like(x, memory_format=torch.contiguous_format)


def _register() -> None:
    def normalized(*arguments: Any) -> tuple[Tensor, ...]:
        (x, *_), settings, _ = NormalizeArguments(*arguments).read()
        groups = sum(number for number, _ in settings.grouping.parts(x.shape[0]))
        wide, channels = accumulation_dtype(x.dtype), x.shape[1]

        def statistic(*shape: int) -> Tensor:
            return x.new_empty(shape, dtype=wide)

        moments = statistic(groups, channels), statistic(groups, channels), statistic(groups, 1)
        return _output_like(x), *moments, statistic(len(Coefficients._fields), groups, channels)

    def differentiated(*arguments: Any) -> tuple[Tensor, ...]:
        _, (x, *_), *_, wants_residual = BackwardArguments(*arguments).read()
        parameter = [x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype)) for _ in range(2)]
        return _output_like(x), *parameter, _output_like(x) if wants_residual else x.new_empty(0)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        y, mean, var, count, coefficients = output
        ctx.mark_non_differentiable(mean, var, count, coefficients)
        tensors, settings, _ = NormalizeArguments(*inputs).read()
        _save(ctx, tensors, settings, y, count, coefficients)

    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        found = _gradients(ctx, dy, Saved(*ctx.saved_tensors))
        return *found, *(None for _ in ctx.needs_input_grad[len(found) :])

    torch.library.register_fake("renorm::normalize", normalized)
    torch.library.register_fake("renorm::normalize_backward", differentiated)
    torch.library.register_autograd("renorm::normalize", backward, setup_context=setup)


_register()
