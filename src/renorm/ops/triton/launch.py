"""The operations on a GPU: what to launch for which tensors.

A plan holds all that follows from shapes, strides, dtypes and options; another call of the same kind looks it up, and
costs two allocations and its launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from ...activation import Activation
from ...checks import check_devices
from ...grouping import Grouping
from ...limits import Limits
from ...moments import Moments
from ..problem import Correction, Given, Inputs, Running, RunningState, Settings, Target, require_unchanged
from ..schema import Saved
from ..tracking import Rule
from . import tracking
from .moments import BATCH, CONSTANT, GIVEN, IN_MEMORY, RENORM, RUNNING, WEIGHED
from .plans import (
    ACC,
    NO_LIMITS,
    BackwardPlan,
    ForwardPlan,
    Launch,
    Options,
    are_bound,
    calls_of,
    kinds_of,
    make_backward,
    make_forward,
    options_of_step,
    stream_of,
)

_MOST_PLANS = 4096
_EXAMINED = 1024  # moments that a program looks at

_Plan = TypeVar("_Plan")
_Found = tuple[Tensor, Tensor, Tensor, "Tensor | None"]  # gradients of x, weight, bias, residual
_plans: dict[Any, Any] = {}


def _on_its_device(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: let it be that of the first tensor."""

    @wraps(operation)
    def call(first: Any, *rest: Any) -> Any:
        device: torch.device = (first if isinstance(first, Tensor) else first[0]).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():  # interpreted, or there already
            return operation(first, *rest)
        with torch.cuda.device(device):
            return operation(first, *rest)

    return call


class _Statistics(NamedTuple):
    """Tensors that scale and offset are made of: running statistics, and r and d, or their limits in memory."""

    mean: Tensor | None = None
    var: Tensor | None = None
    steps: Tensor | None = None
    skipped: Tensor | None = None
    r: Tensor | None = None
    d: Tensor | None = None


@_on_its_device
def normalize(
    inputs: Inputs, settings: Settings, correction: Target | Correction | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """renorm::normalize, see `ops.schema`."""
    options, statistics = Options(BATCH, True), _Statistics()
    if isinstance(correction, Correction):
        options, statistics = Options(GIVEN, True), _Statistics(r=correction.r, d=correction.d)
    elif correction is not None:
        limits, in_memory = _limits(correction.r_max, correction.d_max)
        options = Options(RENORM, True, limits)
        statistics = _Statistics(correction.mean, correction.var, r=in_memory[0], d=in_memory[1])
    y, kept, plan = _forward(inputs, settings, options, statistics)
    return y, plan.matrix(kept, 0), plan.matrix(kept, 1), plan.count(kept), plan.coefficients(kept)


class _Kind(NamedTuple):
    """Steps by a rule; they are planned at each call, since plans depend on addresses too."""

    rule: Rule

    def step(
        self, inputs: Given, settings: Settings, state: RunningState, limits: Limits | None
    ) -> tuple[Tensor, Tensor, ForwardPlan]:
        made: tuple[Tensor, Tensor, ForwardPlan] = step(inputs, settings, state, limits, self.rule)
        return made

    @staticmethod
    def backward(
        dy: Tensor, saved: Sequence[Tensor | None], plan: ForwardPlan, settings: Settings, wants_residual: bool
    ) -> _Found:
        found: _Found = step_backward(dy, saved, plan, settings, wants_residual)
        return found


def kind_of_step(inputs: Inputs, settings: Settings, rule: Rule) -> _Kind:
    """The kind of a step, see `kernels.Kind`."""
    return _Kind(rule)


@_on_its_device
def step(
    inputs: Given, settings: Settings, state: RunningState, limits: Limits | None, rule: Rule
) -> tuple[Tensor, Tensor, ForwardPlan]:
    """A layer's step in eager mode: the output, the buffer of what is kept, and the plan that reads it."""
    return _forward(Inputs(*inputs), settings, options_of_step(limits, rule), _Statistics(*state))


@_on_its_device
def evaluate(inputs: Inputs, settings: Settings, running: Running, example_weight: float) -> Tensor:
    """renorm::evaluate, see `ops.schema`."""
    weighed = example_weight > 0
    grouping = replace(settings.grouping, examples_per_group=1 if weighed else None)
    options = Options(WEIGHED if weighed else RUNNING, False, example_weight=example_weight)
    y, _, _ = _forward(inputs, settings._replace(grouping=grouping), options, _Statistics(*running))
    return y


@_on_its_device
def track(state: RunningState, moments: Moments, rule: Rule, settings: Settings) -> None:
    """renorm::track, see `ops.schema`."""
    groups, channels = moments.mean.shape
    programs = triton.cdiv(groups * channels, _EXAMINED)
    facts = moments.mean.new_empty(1 + programs)
    acc, k = ACC[moments.mean.dtype], settings.grouping.channels_per_group
    looks = {"CUMULATIVE": rule.momentum is None, "BLOCK": _EXAMINED, "ACC": acc}
    moves = {"EPS": settings.eps, "RULE": tracking.CODES[rule.tracking], "ACC": acc}
    examine = Launch(tracking.examine, (programs,), (rule.momentum or 0.0, groups * channels), looks)
    move = Launch(tracking.move, (tracking.programs(channels),), (groups, channels, k, programs), moves)
    examine.first(None, moments.mean, moments.var, state.steps, facts)
    move.first(None, *state, *moments, facts)


def _forward(
    inputs: Inputs, settings: Settings, options: Options, statistics: _Statistics
) -> tuple[Tensor, Tensor, ForwardPlan]:
    x, weight, bias, mask, residual = inputs
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    strides = x.stride()
    if residual is not None and residual.stride() != strides:
        residual = laid_out_as(x, residual)
    given = (x, mask, residual, *(_as_vector(tensor) for tensor in (weight, bias, *statistics)))
    places = [None if tensor is None else tensor.data_ptr() for tensor in given]
    key = (x.shape, strides, x.dtype, x.device, settings, options, *kinds_of(given, places))
    plan: ForwardPlan | None = _plans.get(key)
    if plan is None:
        if not _is_dense(x):
            return _forward(inputs._replace(x=x.contiguous()), settings, options, statistics)
        check_devices(x, given)
        plan = _remember(key, make_forward(x, settings, options, given))
    y, kept = torch.empty_like(x), x.new_empty(plan.kept.size, dtype=plan.wide)
    scratch = x.new_empty(plan.scratch.size, dtype=plan.wide)
    launches = plan.measure, plan.settle, plan.apply, plan.move
    bound = are_bound(*launches)
    at: list[Any] = places if bound else list(given)
    x_at, mask_at, residual_at, weight_at, bias_at, mean_at, var_at, steps_at, skipped_at, r_at, d_at = at
    y_at: Any = y.data_ptr() if bound else y
    mean, var, count, coefficients = plan.kept.places(kept, bound)
    facts, measured = plan.scratch.places(scratch, bound)
    stream = stream_of(x.device) if bound else None
    measure, settles, apply, move = calls_of(bound, *launches)
    if measure is not None:
        measure(stream, x_at, mask_at, measured)
    if settles is not None:
        settles(
            stream, measured, mean, var, count, coefficients, facts, weight_at, bias_at, mean_at, var_at, steps_at,
            r_at, d_at,
        )  # fmt: skip
        apply(
            stream, x_at, mask_at, residual_at, y_at, coefficients, mean_at, var_at, steps_at, skipped_at, mean, var,
            count, facts,
        )  # fmt: skip
    else:
        apply(
            stream, x_at, mask_at, residual_at, y_at, mean, var, count, coefficients, facts, weight_at, bias_at,
            mean_at, var_at, steps_at, r_at, d_at,
        )  # fmt: skip
    if move is not None:
        move(stream, mean_at, var_at, steps_at, skipped_at, mean, var, count, facts)
    return y, kept, plan


@_on_its_device
def normalize_backward(
    dy: Tensor, saved: Saved, grouping: Grouping, act: Activation | None, wants_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """renorm::normalize_backward, see `ops.schema`."""
    x = dense(saved.x)
    residual, y = (None if tensor is None else laid_out_as(x, tensor) for tensor in (saved.residual, saved.y))
    read = (x, _bytes_of(saved.mask), residual, y, saved.weight, saved.count, saved.coefficients)
    key = (x.shape, x.stride(), x.dtype, x.device, grouping, act)
    plans = _plans.get(key)
    if plans is None:
        plans = _remember(key, {})
    dx, dweight, dbias, dresidual = _backward(plans, dy, read, (), Settings(grouping, 0.0, act), wants_residual)
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


@_on_its_device
def step_backward(
    dy: Tensor, saved: Sequence[Tensor | None], plan: ForwardPlan, settings: Settings, wants_residual: bool
) -> _Found:
    """The backward of `step`: from x, weight, mask, residual, y and what was kept."""
    x, weight, mask, residual, y, kept = saved
    assert x is not None
    assert kept is not None
    require_unchanged(dy, saved, plan.kept.size * plan.kept.itemsize)
    if not _is_dense(x):
        x = x.contiguous()
    read = (x, _bytes_of(mask), None if residual is None else laid_out_as(x, residual),
            None if y is None else laid_out_as(x, y), weight, kept, None)  # fmt: skip
    begins, itemsize = plan.kept.begins, plan.kept.itemsize
    offsets = begins[2] * itemsize, begins[3] * itemsize
    return _backward(plan.backwards, dy, read, offsets, settings, wants_residual)


def _backward(
    plans: dict[Any, Any],
    dy: Tensor,
    read: tuple[Tensor | None, ...],
    offsets: tuple[int, ...],
    settings: Settings,
    wants_residual: bool,
) -> _Found:
    """Gradients from x, mask, residual, y, weight, count and coefficients; the last two may lie in one buffer, which
    is then in the place of count, and they at these offsets, in bytes."""
    x: Any = read[0]
    strides = x.stride()
    if dy.stride() != strides:
        dy = laid_out_as(x, dy)
    given = (dy, *read[:4], _as_vector(read[4]), *read[5:])
    places = [None if tensor is None else tensor.data_ptr() for tensor in given]
    key = (strides, wants_residual, *kinds_of(given, places))  # a hook may have saved x in another layout
    plan: BackwardPlan | None = plans.get(key)
    if plan is None:
        check_devices(x, given)
        plan = plans[key] = make_backward(x, settings.grouping, settings.act, given, wants_residual)
    layout, wide = plan.layout, plan.wide
    dx, dresidual = torch.empty_like(x), torch.empty_like(x) if wants_residual else None
    total = x.new_empty((2, layout.channels), dtype=wide)
    scratch = x.new_empty(plan.scratch.size, dtype=wide)
    launches = plan.sum_gradients, plan.settle, plan.differentiate
    bound = are_bound(*launches)
    found: list[Any] = places if bound else list(given)
    if offsets:
        kept = found[-2]
        found[-2:] = [kept + begin if bound else kept[begin // kept.itemsize :] for begin in offsets]
    slopes, summed, gradients = plan.scratch.places(scratch, bound)
    total_at: Any = total.data_ptr() if bound else total
    dx_at: Any = dx.data_ptr() if bound else dx
    dresidual_at: Any = dresidual.data_ptr() if bound and dresidual is not None else dresidual
    stream = stream_of(x.device) if bound else None
    sums, settles, differences = calls_of(bound, *launches)
    dy_at, x_at, mask_at, residual_at, y_at, weight_at, count, coefficients = found
    by_group = total_at if layout.groups == 1 else gradients
    if sums is None:
        differences(
            stream, dy_at, x_at, mask_at, residual_at, y_at, coefficients, count, weight_at, dx_at, dresidual_at,
            by_group,
        )  # fmt: skip
        if layout.groups > 1:
            begin = plan.scratch.begins[2]
            shape = 2, layout.groups, layout.channels
            total = scratch[begin : begin + 2 * layout.groups * layout.channels].view(shape).sum(1)
    else:
        sums(stream, dy_at, x_at, mask_at, residual_at, y_at, coefficients, summed, dresidual_at)
        settles(stream, summed, count, coefficients, weight_at, slopes, by_group)
        differences(
            stream, dy_at, x_at, mask_at, residual_at, y_at, coefficients, slopes, dx_at, dresidual_at, by_group,
            total_at,
        )  # fmt: skip
    dweight, dbias = total.unbind()
    return dx, dweight, dbias, dresidual


def _remember(key: tuple[Any, ...], plan: _Plan) -> _Plan:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def _as_vector(tensor: Tensor | None) -> Tensor | None:
    """A parameter or statistic as the kernels read it, one number after the other."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x itself where memory holds it contiguously or with channels last, else a contiguous copy."""
    return x if _is_dense(x) else x.contiguous()


def laid_out_as(x: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in x's memory layout."""
    if tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x).copy_(tensor)


def _limits(
    r_max: Tensor | float, d_max: Tensor | float
) -> tuple[tuple[int, tuple[float, ...]], tuple[Tensor | None, Tensor | None]]:
    """The limits as numbers where the host knows them, else where the device has them."""
    on_host = [not isinstance(limit, Tensor) or limit.is_cpu for limit in (r_max, d_max)]
    if all(on_host):
        return (CONSTANT, (float(r_max), float(d_max), 0.0, 0.0, 0.0)), (None, None)
    device = next(limit.device for limit in (r_max, d_max) if isinstance(limit, Tensor) and not limit.is_cpu)
    tensors = [torch.as_tensor(limit, dtype=torch.float64).to(device) for limit in (r_max, d_max)]
    return (IN_MEMORY, NO_LIMITS), (tensors[0], tensors[1])


def _bytes_of(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
