"""The operations on a GPU: what to launch for which tensors.

A plan holds all that follows from shapes, strides, dtypes and options; another call of the same kind looks it up, and
costs two allocations and its launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    y, kept, layout = _forward(inputs, settings, options, statistics)
    return y, kept.mean, kept.var, kept.count, kept.coefficients


@_on_its_device
def normalize_and_track(
    inputs: Inputs, settings: Settings, state: RunningState, limits: Limits | tuple[Any, Any] | None, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """renorm::normalize_and_track, see `ops.schema`; limits may be those of all steps."""
    statistics = _Statistics(*state)
    if limits is None:
        options = _Options(BATCH, True, rule=rule)
    elif isinstance(limits, Limits):
        ends = (float(limits.start), float(limits.r_end), float(limits.d_end))
        kind = RAMP if any(ends) else CONSTANT
        options = _Options(RENORM, True, (kind, (limits.r_max, limits.d_max, *ends)), rule=rule)
    else:
        found, in_memory = _limits(*limits)
        options = _Options(RENORM, True, found, rule=rule)
        statistics = statistics._replace(r=in_memory[0], d=in_memory[1])
    y, kept, _ = _forward(inputs, settings, options, statistics)
    return y, kept.count, kept.coefficients


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


class _Kept(NamedTuple):
    """What a training forward leaves of its groups, in one buffer."""

    buffer: Tensor
    layout: Layout
    parts: _Parts

    @property
    def mean(self) -> Tensor:
        return self._matrix(0)

    @property
    def var(self) -> Tensor:
        return self._matrix(1)

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        return self.buffer.as_strided((self.layout.groups, 1), (1, 1), self.parts.begins[2])

    @property
    def coefficients(self) -> Tensor:
        groups, channels = self.layout.groups, self.layout.channels
        return self.buffer.as_strided(
            (COEFFICIENTS, groups, channels), (groups * channels, channels, 1), self.parts.begins[3]
        )

    def _matrix(self, part: int) -> Tensor:
        groups, channels = self.layout.groups, self.layout.channels
        return self.buffer.as_strided((groups, channels), (channels, 1), self.parts.begins[part])


@dataclass(frozen=True)
class _ForwardPlan:
    """Launches of a forward, and the buffers that they need: what is kept, (mean, var, count, coefficients), and what
    is not, (facts, measured)."""

    layout: Layout
    kept: _Parts
    scratch: _Parts
    measure: Launch | None
    settle: Launch | None
    apply: Launch
    move: Launch | None

    @property
    def launches(self) -> list[Launch]:
        return [launch for launch in (self.measure, self.settle, self.apply, self.move) if launch is not None]


def _forward(
    inputs: Inputs, settings: Settings, options: _Options, statistics: _Statistics
) -> tuple[Tensor, _Kept, Layout]:
    x, weight, bias, mask, residual = inputs
    x = dense(x)
    mask, residual = _bytes_of(mask), None if residual is None else laid_out_as(x, residual)
    y = torch.empty_like(x)
    given = (x, mask, residual, y, weight, bias, *statistics)
    places = _places(given)
    plan: _ForwardPlan = _planned(
        _make_forward, (x.shape, x.stride(), x.dtype, x.device, _kinds(given, places), settings, options),
        x, settings, options, given,
    )  # fmt: skip
    wide = accumulation_dtype(x.dtype)
    kept = _Kept(x.new_empty(plan.kept.size, dtype=wide), plan.layout, plan.kept)
    scratch = x.new_empty(plan.scratch.size, dtype=wide)
    if plan.apply.is_bound:
        x_at, mask_at, residual_at, y_at, weight_at, bias_at, mean_at, var_at, steps_at, skipped_at, r_at, d_at = places
        mean, var, count, coefficients = plan.kept.addresses(kept.buffer)
        facts, measured = plan.scratch.addresses(scratch)
        launch: Any = _Again(stream_of(x.device))
    else:
        x_at, mask_at, residual_at, y_at, weight_at, bias_at, mean_at, var_at, steps_at, skipped_at, r_at, d_at = given
        mean, var, count, coefficients = plan.kept.views(kept.buffer)
        facts, measured = plan.scratch.views(scratch)
        launch = _first
    if plan.measure is not None:
        launch(plan.measure, x_at, mask_at, measured)
    if plan.settle is not None:
        launch(
            plan.settle, measured, mean, var, count, coefficients, facts, weight_at, bias_at, mean_at, var_at,
            steps_at, r_at, d_at,
        )  # fmt: skip
        launch(
            plan.apply, x_at, mask_at, residual_at, y_at, coefficients, mean_at, var_at, steps_at, skipped_at, mean,
            var, count, facts,
        )  # fmt: skip
    else:
        launch(
            plan.apply, x_at, mask_at, residual_at, y_at, mean, var, count, coefficients, facts, weight_at, bias_at,
            mean_at, var_at, steps_at, r_at, d_at,
        )  # fmt: skip
    if plan.move is not None:
        launch(plan.move, mean_at, var_at, steps_at, skipped_at, mean, var, count, facts)
    return y, kept, plan.layout


def _make_forward(x: Tensor, settings: Settings, options: _Options, given: tuple[Tensor | None, ...]) -> _ForwardPlan:
    _, mask, residual, _, weight, bias, *_ = given
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
        return _ForwardPlan(layout, kept, _Parts((1 + programs, 0), wide.itemsize), None, None, apply, move)
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
    return _ForwardPlan(layout, kept, scratch, measure, settled, apply, None)


@dataclass(frozen=True)
class _BackwardPlan:
    """Launches of a backward, and the parts of its buffer: slopes, sums, and gradients of weight and bias by group."""

    layout: Layout
    scratch: _Parts
    sum_gradients: Launch | None
    settle: Launch | None
    differentiate: Launch


@_on_its_device
def normalize_backward(
    dy: Tensor, saved: Saved, grouping: Grouping, act: Activation | None, wants_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """renorm::normalize_backward, see `ops.schema`."""
    x = dense(saved.x)
    residual, y = (None if tensor is None else laid_out_as(x, tensor) for tensor in (saved.residual, saved.y))
    mask, weight, dy = _bytes_of(saved.mask), saved.weight, laid_out_as(x, dy)
    dx, dresidual = torch.empty_like(x), torch.empty_like(x) if wants_residual else None
    given = (dy, x, mask, residual, y, weight, saved.count, saved.coefficients, dx, dresidual)
    places = _places(given)
    plan: _BackwardPlan = _planned(
        _make_backward, (x.shape, x.stride(), x.dtype, x.device, _kinds(given, places), grouping, act),
        x, grouping, act, given,
    )  # fmt: skip
    wide, layout = accumulation_dtype(x.dtype), plan.layout
    total = x.new_empty((2, layout.channels), dtype=wide)
    scratch = x.new_empty(plan.scratch.size, dtype=wide)
    if plan.differentiate.is_bound:
        dy_at, x_at, mask_at, residual_at, y_at, weight_at, count, coefficients, dx_at, dresidual_at = places
        slopes, summed, gradients = plan.scratch.addresses(scratch)
        total_at: Any = total.data_ptr()
        launch: Any = _Again(stream_of(x.device))
    else:
        dy_at, x_at, mask_at, residual_at, y_at, weight_at, count, coefficients, dx_at, dresidual_at = given
        slopes, summed, gradients = plan.scratch.views(scratch)
        total_at = total
        launch = _first
    by_group = total_at if layout.groups == 1 else gradients
    read = (dy_at, x_at, mask_at, residual_at, y_at, coefficients)
    if plan.sum_gradients is None:
        launch(plan.differentiate, *read, count, weight_at, dx_at, dresidual_at, by_group)
        if layout.groups > 1:
            begin = plan.scratch.begins[2]
            shape = 2, layout.groups, layout.channels
            total = scratch[begin : begin + 2 * layout.groups * layout.channels].view(shape).sum(1)
    else:
        launch(plan.sum_gradients, *read, summed, dresidual_at)
        launch(plan.settle, summed, count, coefficients, weight_at, slopes, by_group)
        launch(plan.differentiate, *read, slopes, dx_at, dresidual_at, by_group, total_at)
    dweight, dbias = total.unbind()
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


def _make_backward(
    x: Tensor, grouping: Grouping, act: Activation | None, given: tuple[Tensor | None, ...]
) -> _BackwardPlan:
    _, _, mask, residual, y, weight, *_, dresidual = given
    layout, wide = Layout.of(x, grouping), accumulation_dtype(x.dtype)
    groups, channels, acc = layout.groups, layout.channels, _ACC[wide]
    before = {"RESIDUAL": residual is not None, "FROM_Y": y is not None, "ACT": CODES[act]}
    by_group = 2 * groups * channels if groups > 1 else 0
    whole = whole_channels(layout, wide.itemsize)
    if whole is not None:
        tiling = _tiling(layout, whole) | {"MASKED": mask is not None, "ACC": acc}
        made_of = {"WEIGHT": weight is not None, "WRITES": dresidual is not None}
        one = Launch(
            backward.differentiate_whole, (whole.blocks * groups,), _shape(layout), made_of | before | tiling
        )
        return _BackwardPlan(layout, _Parts((0, 0, by_group), wide.itemsize), None, None, one)
    registers = _registers(x, layout, mask, act)
    pieces = cut(layout, x.dtype.itemsize, processors(x.device), registers)
    grid, tiling = (pieces.blocks * groups, pieces.splits), _streaming(layout, pieces, acc, mask, registers)
    rows = _rows(layout, pieces)
    sums = Launch(
        backward.sum_gradients, grid, (*rows, pieces.blocks_per_channel),
        {"WRITES": dresidual is not None} | before | tiling,
    )  # fmt: skip
    settling, programs = _settling(layout, pieces, settle.settle_backward, settle.settle_sharing_backward)
    settled = Launch(
        settling.kernel, (programs,),
        (channels, layout.positions, groups, pieces.slots, pieces.blocks_per_channel, *settling.numbers),
        {"WEIGHT": weight is not None, "ACC": acc} | settling.constants,
    )  # fmt: skip
    differences = Launch(
        backward.differentiate, grid, rows, {"WRITTEN": dresidual is not None, "ADDS": groups > 1} | before | tiling
    )
    scratch = _Parts((3 * groups * channels, SUMMED * groups * channels * pieces.slots, by_group), wide.itemsize)
    return _BackwardPlan(layout, scratch, sums, settled, differences)


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


class _Again:
    """Launches that are bound, on a stream."""

    __slots__ = ("_stream",)

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __call__(self, launch: Launch, *places: int | None) -> None:
        launch(self._stream, *places)


def _first(launch: Launch, *tensors: Tensor | None) -> None:
    launch.first(*tensors)


def _planned(make: Callable[..., _Plan], key: tuple[Any, ...], *arguments: Any) -> _Plan:
    key = (make, *key)
    plan: _Plan | None = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = make(*arguments)
    return plan


def _places(tensors: tuple[Tensor | None, ...]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _kinds(tensors: tuple[Tensor | None, ...], places: list[int | None]) -> tuple[Any, ...]:
    """Which there are, of what dtype, and which of them do not lie on 16 bytes."""
    return (
        *[None if tensor is None else tensor.dtype for tensor in tensors],
        *[i for i, place in enumerate(places) if place is not None and place % _ALIGNED],
    )


def dense(x: Tensor) -> Tensor:
    """x itself where memory holds it contiguously or with channels last, else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


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
