"""The operations on a GPU: what to launch for which tensors.

A plan holds all that follows from shapes, strides, dtypes and options; another call of the same kind looks it up, and
costs two allocations and its launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, wraps
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...activation import Activation, is_piecewise_linear
from ...grouping import Grouping
from ...limits import Limits
from ...moments import Moments, accumulation_dtype
from ..problem import Correction, Inputs, Running, RunningState, Settings, Target
from ..schema import Saved
from ..tracking import Rule
from . import backward, forward, settle, tracking
from .activation import CODES
from .bound import Launch, stream_of
from .moments import (
    BATCH,
    COEFFICIENTS,
    CONSTANT,
    GIVEN,
    IN_MEMORY,
    MEASURED,
    RAMP,
    RENORM,
    RUNNING,
    SUMMED,
    WEIGHED,
)
from .tiles import MORE_REGISTERS, REGISTERS, Cut, Layout, WholeCut, cut, whole_channels

_INTERPRETED_PROCESSORS = 1
_MOST_PLANS = 4096
_ALIGNED = 16  # bytes
_EXAMINED = 1024  # moments that a program looks at
_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
_NO_LIMITS = (1.0, 0.0, 0.0, 0.0, 0.0)

_Plan = TypeVar("_Plan")
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


class _Options(NamedTuple):
    """What a forward is, apart from its tensors.

    Args:
        source: where scale and offset come from.
        keeps: whether moments and coefficients are kept, for a backward and for the running statistics.
        limits: kind of the limits, and r_max, d_max, start, r_end and d_end.
        example_weight: alpha.
        rule: by which the running statistics move; None if they stay.
    """

    source: int
    keeps: bool
    limits: tuple[int, tuple[float, ...]] = (CONSTANT, _NO_LIMITS)
    example_weight: float = 0.0
    rule: Rule | None = None


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
    options, statistics = _Options(BATCH, True), _Statistics()
    if isinstance(correction, Correction):
        options, statistics = _Options(GIVEN, True), _Statistics(r=correction.r, d=correction.d)
    elif correction is not None:
        limits, in_memory = _limits(correction.r_max, correction.d_max)
        options = _Options(RENORM, True, limits)
        statistics = _Statistics(correction.mean, correction.var, r=in_memory[0], d=in_memory[1])
    y, kept, plan = _forward(inputs, settings, options, statistics)
    return y, plan.matrix(kept, 0), plan.matrix(kept, 1), plan.count(kept), plan.coefficients(kept)


@_on_its_device
def step(
    inputs: Inputs, settings: Settings, state: RunningState, limits: Limits | None, rule: Rule
) -> tuple[Tensor, Tensor, Any]:
    """`normalize_and_track` for eager code: the output, the buffer of what is kept, and the plan that reads it."""
    y, kept, plan = _forward(inputs, settings, (limits, rule), _Statistics(*state))
    return y, kept, plan


@_on_its_device
def normalize_and_track(
    inputs: Inputs, settings: Settings, state: RunningState, limits: tuple[Any, Any] | None, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """renorm::normalize_and_track, see `ops.schema`."""
    statistics, known = _Statistics(*state), None
    if limits is not None:
        known, in_memory = _limits(*limits)
        statistics = statistics._replace(r=in_memory[0], d=in_memory[1])
    y, kept, plan = _forward(inputs, settings, (known, rule), statistics)
    return y, plan.count(kept), plan.coefficients(kept)


@_on_its_device
def evaluate(inputs: Inputs, settings: Settings, running: Running, example_weight: float) -> Tensor:
    """renorm::evaluate, see `ops.schema`."""
    weighed = example_weight > 0
    grouping = replace(settings.grouping, examples_per_group=1 if weighed else None)
    options = _Options(WEIGHED if weighed else RUNNING, False, example_weight=example_weight)
    y, _, _ = _forward(inputs, settings._replace(grouping=grouping), options, _Statistics(*running))
    return y


@_on_its_device
def track(state: RunningState, moments: Moments, rule: Rule, settings: Settings) -> None:
    """renorm::track, see `ops.schema`."""
    groups, channels = moments.mean.shape
    programs = triton.cdiv(groups * channels, _EXAMINED)
    facts = moments.mean.new_empty(1 + programs)
    acc = _ACC[moments.mean.dtype]
    tracking.examine[programs,](
        moments.mean, moments.var, state.steps, facts, rule.momentum or 0.0, groups * channels,
        CUMULATIVE=rule.momentum is None, BLOCK=_EXAMINED, ACC=acc,
    )  # fmt: skip
    tracking.move[triton.cdiv(channels, 32),](
        *state, *moments, facts, groups, channels, settings.grouping.channels_per_group, programs,
        EPS=settings.eps, RULE=tracking.CODES[rule.tracking], ACC=acc,
    )  # fmt: skip


class _Parts:
    """Pieces of one buffer, each on 16 bytes."""

    def __init__(self, sizes: Sequence[int], itemsize: int) -> None:
        step = max(1, _ALIGNED // itemsize)
        padded = [-(-size // step) * step for size in sizes]
        self.begins = [0, *accumulate(padded)][:-1]
        self.size, self.sizes, self.itemsize = sum(padded), sizes, itemsize

    def views(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[begin : begin + size] for begin, size in zip(self.begins, self.sizes, strict=True)]

    def addresses(self, buffer: Tensor) -> list[int]:
        base, itemsize = buffer.data_ptr(), self.itemsize
        return [base + begin * itemsize for begin in self.begins]


@dataclass(frozen=True)
class _ForwardPlan:
    """Launches of a forward, and the buffers that they need: what is kept, (mean, var, count, coefficients), and what
    is not, (facts, measured)."""

    layout: Layout
    wide: torch.dtype
    kept: _Parts
    scratch: _Parts
    measure: Launch | None
    settle: Launch | None
    apply: Launch
    move: Launch | None
    backwards: dict[Any, Any] = field(default_factory=dict)  # plans of the backward, by what only it knows

    @property
    def launches(self) -> tuple[Launch | None, ...]:
        return self.measure, self.settle, self.apply, self.move

    def matrix(self, kept: Tensor, part: int) -> Tensor:
        """Mean or variance of a buffer of what is kept, (G, C)."""
        groups, channels = self.layout.groups, self.layout.channels
        return kept.as_strided((groups, channels), (channels, 1), self.kept.begins[part])

    def count(self, kept: Tensor) -> Tensor:
        """Elements of each group, (G, 1)."""
        return kept.as_strided((self.layout.groups, 1), (1, 1), self.kept.begins[2])

    def coefficients(self, kept: Tensor) -> Tensor:
        """See `schema.Coefficients`, (6, G, C)."""
        groups, channels = self.layout.groups, self.layout.channels
        shape, strides = (COEFFICIENTS, groups, channels), (groups * channels, channels, 1)
        return kept.as_strided(shape, strides, self.kept.begins[3])


def _options(of_step: tuple[Any, Rule]) -> _Options:
    """Those of a training step by limits, of all steps or as `_limits` found them, and a rule."""
    limits, rule = of_step
    if limits is None:
        return _Options(BATCH, True, rule=rule)
    if not isinstance(limits, Limits):
        return _Options(RENORM, True, limits, rule=rule)
    ends = (float(limits.start), float(limits.r_end), float(limits.d_end))
    kind = RAMP if any(ends) else CONSTANT
    return _Options(RENORM, True, (kind, (limits.r_max, limits.d_max, *ends)), rule=rule)


def _forward(
    inputs: Inputs, settings: Settings, options: _Options | tuple[Any, Rule], statistics: _Statistics
) -> tuple[Tensor, Tensor, _ForwardPlan]:
    x, weight, bias, mask, residual = inputs
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    strides = x.stride()
    if residual is not None and residual.stride() != strides:
        residual = laid_out_as(x, residual)
    given = (x, mask, residual, weight, bias, *statistics)
    places = [None if tensor is None else tensor.data_ptr() for tensor in given]
    key = (x.shape, strides, x.dtype, x.device, settings, options, *_kinds(given, places))
    plan: _ForwardPlan | None = _plans.get(key)
    if plan is None:
        if not _is_dense(x):
            return _forward(inputs._replace(x=x.contiguous()), settings, options, statistics)
        known = options if isinstance(options, _Options) else _options(options)
        plan = _remember(key, _make_forward(x, settings, known, given))
    y, kept = torch.empty_like(x), x.new_empty(plan.kept.size, dtype=plan.wide)
    scratch = x.new_empty(plan.scratch.size, dtype=plan.wide)
    if plan.apply.is_bound:
        x_at, mask_at, residual_at, weight_at, bias_at, mean_at, var_at, steps_at, skipped_at, r_at, d_at = places
        y_at: Any = y.data_ptr()
        mean, var, count, coefficients = plan.kept.addresses(kept)
        facts, measured = plan.scratch.addresses(scratch)
        stream = stream_of(x.device)
        measure, settles, apply, move = plan.measure, plan.settle, plan.apply, plan.move
    else:
        x_at, mask_at, residual_at, weight_at, bias_at, mean_at, var_at, steps_at, skipped_at, r_at, d_at = given
        y_at = y
        mean, var, count, coefficients = plan.kept.views(kept)
        facts, measured = plan.scratch.views(scratch)
        stream = None
        measure, settles, apply, move = (each and each.first for each in plan.launches)
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


def _make_forward(x: Tensor, settings: Settings, options: _Options, given: tuple[Tensor | None, ...]) -> _ForwardPlan:
    _, mask, residual, weight, bias, *_ = given
    layout, wide = Layout.of(x, settings.grouping), accumulation_dtype(x.dtype)
    groups, channels, k = layout.groups, layout.channels, layout.channels_per_group
    acc, rule = _ACC[wide], options.rule
    kind, numbers_of_limits = options.limits
    momentum = 0.0 if rule is None or rule.momentum is None else rule.momentum
    numbers = (*map(float, numbers_of_limits), options.example_weight, momentum)
    made_of = {
        "EPS": settings.eps, "SOURCE": options.source, "LIMITS": kind,
        "CUMULATIVE": rule is not None and rule.momentum is None, "WEIGHT": weight is not None,
        "BIAS": bias is not None, "KEEPS": options.keeps, "ACC": acc,
    }  # fmt: skip
    output = {"RESIDUAL": residual is not None, "ACT": CODES[settings.act], "MASKED": mask is not None}
    moves = {"EPS": settings.eps, "RULE": tracking.NONE if rule is None else tracking.CODES[rule.tracking], "ACC": acc}
    whole = whole_channels(layout, wide.itemsize) if options.source != RUNNING else None
    statistics = (groups * channels, groups * channels, groups) if options.keeps else (0, 0, 0)
    coefficients = COEFFICIENTS * groups * channels if options.keeps or whole is None else 0
    kept = _Parts((*statistics, coefficients), wide.itemsize)
    if whole is not None:
        programs = whole.blocks * groups
        move = None
        if rule is not None:
            move = Launch(tracking.move, (triton.cdiv(channels, 32),), (groups, channels, k, programs), moves)
        apply = Launch(
            forward.apply_whole, (programs,), (*numbers, *_shape(layout)), made_of | output | _tiling(layout, whole)
        )
        return _ForwardPlan(layout, wide, kept, _Parts((1 + programs, 0), wide.itemsize), None, None, apply, move)
    registers = _registers(x, layout, mask, settings.act)
    pieces = cut(layout, x.dtype.itemsize, processors(x.device), registers)
    grid, tiling = (pieces.blocks * groups, pieces.splits), _streaming(layout, pieces, acc, mask, registers)
    rows = _rows(layout, pieces)
    slots = pieces.slots if options.source != RUNNING else 0
    measure = None
    if slots:
        measure = Launch(forward.measure, grid, (*rows, pieces.blocks_per_channel), tiling)
    settling, programs = _settling(layout, pieces, settle.settle, settle.settle_sharing)
    made_of |= settling.constants
    settled = Launch(
        settling.kernel, (programs,),
        (*numbers, channels, layout.positions, groups, pieces.slots, pieces.blocks_per_channel, *settling.numbers),
        made_of,
    )  # fmt: skip
    apply = Launch(forward.apply, grid, (*rows, k, programs), moves | output | tiling)
    scratch = _Parts((1 + programs, MEASURED * groups * channels * slots), wide.itemsize)
    return _ForwardPlan(layout, wide, kept, scratch, measure, settled, apply, None)


@dataclass(frozen=True)
class _BackwardPlan:
    """Launches of a backward, and the parts of its buffer: slopes, sums, and gradients of weight and bias by group."""

    layout: Layout
    wide: torch.dtype
    scratch: _Parts
    sum_gradients: Launch | None
    settle: Launch | None
    differentiate: Launch

    @property
    def launches(self) -> tuple[Launch | None, ...]:
        return self.sum_gradients, self.settle, self.differentiate


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
    dx, dweight, dbias, dresidual = _backward(plans, dy, read, (), grouping, act, wants_residual)
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


@_on_its_device
def step_backward(
    dy: Tensor, saved: Sequence[Tensor | None], plan: _ForwardPlan, settings: Settings, wants_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The backward of `step`: from x, weight, mask, residual, y and what was kept."""
    x, weight, mask, residual, y, kept = saved
    assert x is not None
    assert kept is not None
    if not _is_dense(x):
        x = x.contiguous()
    read = (x, _bytes_of(mask), None if residual is None else laid_out_as(x, residual),
            None if y is None else laid_out_as(x, y), weight, kept, None)  # fmt: skip
    begins, itemsize = plan.kept.begins, plan.kept.itemsize
    return _backward(
        plan.backwards, dy, read, (begins[2] * itemsize, begins[3] * itemsize), settings.grouping, settings.act,
        wants_residual,
    )  # fmt: skip


def _backward(
    plans: dict[Any, Any], dy: Tensor, read: tuple[Tensor | None, ...], offsets: tuple[int, ...], grouping: Grouping,
    act: Activation | None, wants_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients from x, mask, residual, y, weight, count and coefficients; the last two may lie in one buffer, which
    is then in the place of count, and they at these offsets, in bytes."""
    x: Any = read[0]
    if dy.stride() != x.stride():
        dy = laid_out_as(x, dy)
    given = (dy, *read)
    places = [None if tensor is None else tensor.data_ptr() for tensor in given]
    key = (wants_residual, *_kinds(given, places))
    plan: _BackwardPlan | None = plans.get(key)
    if plan is None:
        plan = plans[key] = _make_backward(x, grouping, act, given, wants_residual)
    layout, wide = plan.layout, plan.wide
    dx, dresidual = torch.empty_like(x), torch.empty_like(x) if wants_residual else None
    total = x.new_empty((2, layout.channels), dtype=wide)
    scratch = x.new_empty(plan.scratch.size, dtype=wide)
    found: tuple[Any, ...]
    if plan.differentiate.is_bound:
        if offsets:
            buffer: Any = places[-2]
            places[-2:] = buffer + offsets[0], buffer + offsets[1]
        found = tuple(places)
        slopes, summed, gradients = plan.scratch.addresses(scratch)
        total_at: Any = total.data_ptr()
        dx_at: Any = dx.data_ptr()
        dresidual_at: Any = None if dresidual is None else dresidual.data_ptr()
        stream = stream_of(x.device)
        sums, settles, differences = plan.sum_gradients, plan.settle, plan.differentiate
    else:
        found = given
        if offsets:
            kept: Any = given[-2]
            found = (*given[:-2], *(kept[begin // kept.itemsize :] for begin in offsets))
        slopes, summed, gradients = plan.scratch.views(scratch)
        total_at, dx_at, dresidual_at, stream = total, dx, dresidual, None
        sums, settles, differences = (each and each.first for each in plan.launches)
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


def _make_backward(
    x: Tensor, grouping: Grouping, act: Activation | None, given: tuple[Tensor | None, ...], wants_residual: bool
) -> _BackwardPlan:
    _, _, mask, residual, y, weight, *_ = given
    layout, wide = Layout.of(x, grouping), accumulation_dtype(x.dtype)
    groups, channels, acc = layout.groups, layout.channels, _ACC[wide]
    before = {"RESIDUAL": residual is not None, "FROM_Y": y is not None, "ACT": CODES[act]}
    by_group = 2 * groups * channels if groups > 1 else 0
    whole = whole_channels(layout, wide.itemsize)
    if whole is not None:
        tiling = _tiling(layout, whole) | {"MASKED": mask is not None, "ACC": acc}
        made_of = {"WEIGHT": weight is not None, "WRITES": wants_residual}
        one = Launch(
            backward.differentiate_whole, (whole.blocks * groups,), _shape(layout), made_of | before | tiling
        )
        return _BackwardPlan(layout, wide, _Parts((0, 0, by_group), wide.itemsize), None, None, one)
    registers = _registers(x, layout, mask, act)
    pieces = cut(layout, x.dtype.itemsize, processors(x.device), registers)
    grid, tiling = (pieces.blocks * groups, pieces.splits), _streaming(layout, pieces, acc, mask, registers)
    rows = _rows(layout, pieces)
    sums = Launch(
        backward.sum_gradients, grid, (*rows, pieces.blocks_per_channel),
        {"WRITES": wants_residual} | before | tiling,
    )  # fmt: skip
    settling, programs = _settling(layout, pieces, settle.settle_backward, settle.settle_sharing_backward)
    settled = Launch(
        settling.kernel, (programs,),
        (channels, layout.positions, groups, pieces.slots, pieces.blocks_per_channel, *settling.numbers),
        {"WEIGHT": weight is not None, "ACC": acc} | settling.constants,
    )  # fmt: skip
    differences = Launch(
        backward.differentiate, grid, rows, {"WRITTEN": wants_residual, "ADDS": groups > 1} | before | tiling
    )
    scratch = _Parts((3 * groups * channels, SUMMED * groups * channels * pieces.slots, by_group), wide.itemsize)
    return _BackwardPlan(layout, wide, scratch, sums, settled, differences)


class _Settling(NamedTuple):
    kernel: Any
    numbers: tuple[int, ...]
    constants: dict[str, Any]


def _settling(layout: Layout, pieces: Cut, alone: Any, sharing: Any) -> tuple[_Settling, int]:
    """Which kernel settles, with what, and by how many programs."""
    tile = {"PLANES": not layout.channels_last, "W": pieces.width, "num_warps": settle.WARPS}
    k = layout.channels_per_group
    if k > 1:
        tile |= {"BC": settle.SHARING_CHANNELS, "SLOTS": settle.SHARING_SLOTS}
        return _Settling(sharing, (k,), tile), layout.channels // k * layout.groups
    tile |= {"BC": settle.CHANNELS, "SLOTS": settle.SLOTS}
    return _Settling(alone, (), tile), triton.cdiv(layout.channels, settle.CHANNELS) * layout.groups


def _shape(layout: Layout) -> tuple[int, ...]:
    return layout.examples, layout.channels, layout.positions, layout.examples_per_group, layout.groups


def _rows(layout: Layout, pieces: Cut) -> tuple[int, ...]:
    return (
        layout.columns // pieces.divisor, layout.examples, layout.positions, layout.examples_per_group, layout.groups,
        pieces.blocks, pieces.share,
    )  # fmt: skip


def _tiling(layout: Layout, whole: WholeCut) -> dict[str, Any]:
    return {
        "CHANNELS_LAST": layout.channels_last, "E": whole.elements, "BC": whole.channels, "RUN": whole.run,
        "num_warps": whole.warps,
    }  # fmt: skip


def _streaming(layout: Layout, pieces: Cut, acc: Any, mask: Tensor | None, registers: int) -> dict[str, Any]:
    found = {
        "DIVISOR": pieces.divisor, "PLANES": not layout.channels_last, "E": pieces.height, "W": pieces.width,
        "MASKED": mask is not None, "ACC": acc, "num_warps": pieces.warps,
    }  # fmt: skip
    return found if torch.version.hip else found | {"maxnreg": registers}


def _registers(x: Tensor, layout: Layout, mask: Tensor | None, act: Activation | None) -> int:
    """Registers of a thread that a pass over the data is given."""
    is_lean = mask is None and x.dtype != torch.float64 and (act is None or is_piecewise_linear(act))
    is_lean &= layout.channels_last  # a scan over columns takes more
    return REGISTERS if is_lean else MORE_REGISTERS


def _remember(key: tuple[Any, ...], plan: _Plan) -> _Plan:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def _kinds(tensors: tuple[Tensor | None, ...], places: list[int | None]) -> list[Any]:
    """Which there are, of what dtype, and which of them do not lie on 16 bytes."""
    kinds: list[Any] = [None if tensor is None else tensor.dtype for tensor in tensors]
    bits = 0
    for place in places:
        bits |= place or 0
    if bits % _ALIGNED:
        kinds += [i for i, place in enumerate(places) if place is not None and place % _ALIGNED]
    return kinds


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


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a few for the interpreter, which has none."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _limits(
    r_max: Tensor | float, d_max: Tensor | float
) -> tuple[tuple[int, tuple[float, ...]], tuple[Tensor | None, Tensor | None]]:
    """The limits as numbers where the host knows them, else where the device has them."""
    on_host = [not isinstance(limit, Tensor) or limit.is_cpu for limit in (r_max, d_max)]
    if all(on_host):
        return (CONSTANT, (float(r_max), float(d_max), 0.0, 0.0, 0.0)), (None, None)
    device = next(limit.device for limit in (r_max, d_max) if isinstance(limit, Tensor) and not limit.is_cpu)
    tensors = [torch.as_tensor(limit, dtype=torch.float64).to(device) for limit in (r_max, d_max)]
    return (IN_MEMORY, _NO_LIMITS), (tensors[0], tensors[1])


def _bytes_of(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
