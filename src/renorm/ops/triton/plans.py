"""Plans: what is launched for tensors of a kind, worked out once, and then bound.

A kind is shapes, strides, dtypes, options, and which tensors lie on 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...activation import Activation, is_piecewise_linear
from ...grouping import Grouping
from ...limits import Limits
from ...moments import accumulation_dtype
from ..problem import LaunchError, Settings
from ..tracking import Rule
from . import backward, forward, settle, tracking
from .activation import CODES
from .moments import BATCH, COEFFICIENTS, CONSTANT, MEASURED, RAMP, RENORM, RUNNING, SUMMED
from .tiles import (
    MORE_REGISTERS,
    REGISTERS,
    REGISTERS_OF_PLANES,
    Cut,
    Layout,
    WholeCut,
    cut,
    whole_channels,
)

ALIGNED = 16  # bytes
ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
NO_LIMITS = (1.0, 0.0, 0.0, 0.0, 0.0)
_INTERPRETED_PROCESSORS = 1


class Launch:
    """A kernel with its grid and all that is no tensor.

    The first call goes through Triton, which compiles. Later ones call what it compiled, some 3 us instead of 20; their
    tensors must have the dtypes of the first, and lie on 16 bytes where those did.

    Args:
        kernel: with tensors first, then numbers, then constants.
        grid: programs along each axis.
        numbers: of the kernel, in order.
        constants: by name, and `num_warps`.
    """

    __slots__ = ("_bound", "_constants", "_grid", "_kernel", "_numbers")

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        self._bound: Any = None

    @property
    def is_bound(self) -> bool:
        """Whether places may be integers."""
        return self._bound is not None

    def first(self, _: None, *tensors: Tensor | None) -> None:
        """Launch through Triton, on the current stream, and keep what it found.

        Raises:
            LaunchError: Triton cannot compile it, or load it.
        """
        try:
            compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        except Exception as error:  # of Triton's compiler, its assembler, the C compiler that it calls, the driver
            raise LaunchError(f"{self._kernel.__name__}: {type(error).__name__}: {error}") from error
        self._bound = _bind(compiled, self._kernel, self._grid, len(tensors), self._numbers, self._constants)

    def __call__(self, stream: int, *places: int | None) -> None:
        """Launch again, on a stream."""
        run, grid, function, metadata, rest = self._bound
        run(*grid, stream, function, metadata, None, None, None, *places, *rest)


def _bind(
    compiled: Any, kernel: Any, grid: tuple[int, ...], tensors: int, numbers: tuple[Any, ...], constants: dict[str, Any]
) -> Any:
    """What a later launch needs; None where this Triton has it otherwise, or interprets."""
    try:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        names = kernel.arg_names[tensors + len(numbers) :]
        return run, (*grid, 1, 1)[:3], function, metadata, (*numbers, *(constants[name] for name in names))
    except (AttributeError, KeyError):
        return None


def are_bound(*launches: Launch | None) -> bool:
    """Whether all of them take places."""
    return all(launch is None or launch.is_bound for launch in launches)


def calls_of(bound: bool, *launches: Launch | None) -> list[Any]:
    """How to make each launch: with a stream, and places if they are bound, else tensors."""
    return [launch and (launch if bound else launch.first) for launch in launches]


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as launches take it."""
    stream: int = triton.runtime.driver.active.get_current_stream(device.index or 0)
    return stream


class Options(NamedTuple):
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
    limits: tuple[int, tuple[float, ...]] = (CONSTANT, NO_LIMITS)
    example_weight: float = 0.0
    rule: Rule | None = None


@lru_cache(maxsize=256)
def options_of_step(limits: Limits | None, rule: Rule) -> Options:
    """Those of a layer's training step."""
    if limits is None:
        return Options(BATCH, True, rule=rule)
    ends = (float(limits.start), float(limits.r_end), float(limits.d_end))
    kind = RAMP if any(ends) else CONSTANT
    return Options(RENORM, True, (kind, (limits.r_max, limits.d_max, *ends)), rule=rule)


class Parts:
    """Pieces of one buffer, each on 16 bytes."""

    def __init__(self, sizes: Sequence[int], itemsize: int) -> None:
        step = max(1, ALIGNED // itemsize)
        padded = [-(-size // step) * step for size in sizes]
        self.begins = [0, *accumulate(padded)][:-1]
        self.size, self.sizes, self.itemsize = sum(padded), sizes, itemsize

    def places(self, buffer: Tensor, bound: bool) -> list[Any]:
        """Where they lie for launches that are bound, else views."""
        if bound:
            base, itemsize = buffer.data_ptr(), self.itemsize
            return [base + begin * itemsize for begin in self.begins]
        return [buffer[begin : begin + size] for begin, size in zip(self.begins, self.sizes, strict=True)]


@dataclass(frozen=True)
class ForwardPlan:
    """Launches of a forward, and the buffers that they need: what is kept, (mean, var, count, coefficients), and what
    is not, (facts, measured)."""

    layout: Layout
    wide: torch.dtype
    kept: Parts
    scratch: Parts
    measure: Launch | None
    settle: Launch | None
    apply: Launch
    move: Launch | None
    backwards: dict[Any, Any] = field(default_factory=dict)  # plans of the backward, by what only it knows

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


def make_forward(x: Tensor, settings: Settings, options: Options, given: tuple[Tensor | None, ...]) -> ForwardPlan:
    _, mask, residual, weight, bias, *_ = given
    layout, wide = Layout.of(x, settings.grouping), accumulation_dtype(x.dtype)
    groups, channels, k = layout.groups, layout.channels, layout.channels_per_group
    acc, rule = ACC[wide], options.rule
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
    kept = Parts((*statistics, coefficients), wide.itemsize)
    if whole is not None:
        programs = whole.blocks * groups
        move = None
        if rule is not None:
            move = Launch(tracking.move, (tracking.programs(channels),), (groups, channels, k, programs), moves)
        apply = Launch(
            forward.apply_whole, (programs,), (*numbers, *_shape(layout)), made_of | output | _tiling(layout, whole)
        )
        return ForwardPlan(layout, wide, kept, Parts((1 + programs, 0), wide.itemsize), None, None, apply, move)
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
    chunk = _chunk(layout, 2 if residual is not None or mask is not None else 4)
    apply = Launch(forward.apply, grid, (*rows, k, programs), moves | output | tiling | {"CHUNK": chunk})
    scratch = Parts((1 + programs, MEASURED * groups * channels * slots), wide.itemsize)
    return ForwardPlan(layout, wide, kept, scratch, measure, settled, apply, None)


@dataclass(frozen=True)
class BackwardPlan:
    """Launches of a backward, and the parts of its buffer: slopes, sums, and gradients of weight and bias by group."""

    layout: Layout
    wide: torch.dtype
    scratch: Parts
    sum_gradients: Launch | None
    settle: Launch | None
    differentiate: Launch


def make_backward(
    x: Tensor, grouping: Grouping, act: Activation | None, given: tuple[Tensor | None, ...], wants_residual: bool
) -> BackwardPlan:
    _, _, mask, residual, y, weight, *_ = given
    layout, wide = Layout.of(x, grouping), accumulation_dtype(x.dtype)
    groups, channels, acc = layout.groups, layout.channels, ACC[wide]
    before = {"RESIDUAL": residual is not None, "FROM_Y": y is not None, "ACT": CODES[act]}
    by_group = 2 * groups * channels if groups > 1 else 0
    whole = whole_channels(layout, wide.itemsize)
    if whole is not None:
        tiling = _tiling(layout, whole) | {"MASKED": mask is not None, "ACC": acc}
        made_of = {"WEIGHT": weight is not None, "WRITES": wants_residual}
        one = Launch(backward.differentiate_whole, (whole.blocks * groups,), _shape(layout), made_of | before | tiling)
        return BackwardPlan(layout, wide, Parts((0, 0, by_group), wide.itemsize), None, None, one)
    registers = _registers(x, layout, mask, act)
    pieces = cut(layout, x.dtype.itemsize, processors(x.device), registers)
    grid, tiling = (pieces.blocks * groups, pieces.splits), _streaming(layout, pieces, acc, mask, registers)
    rows = _rows(layout, pieces)
    reads_more = mask is not None or residual is not None or y is not None  # than the registers hold twice
    sums = Launch(
        backward.sum_gradients, grid, (*rows, pieces.blocks_per_channel),
        {"WRITES": wants_residual, "CHUNK": _chunk(layout, 1 if reads_more else 2)} | before | tiling,
    )  # fmt: skip
    settling, programs = _settling(layout, pieces, settle.settle_backward, settle.settle_sharing_backward)
    settled = Launch(
        settling.kernel, (programs,),
        (channels, layout.positions, groups, pieces.slots, pieces.blocks_per_channel, *settling.numbers),
        {"WEIGHT": weight is not None, "ACC": acc} | settling.constants,
    )  # fmt: skip
    differences = Launch(
        backward.differentiate, grid, rows,
        {"WRITTEN": wants_residual, "ADDS": groups > 1, "CHUNK": _chunk(layout, 2)} | before | tiling,
    )  # fmt: skip
    scratch = Parts((3 * groups * channels, SUMMED * groups * channels * pieces.slots, by_group), wide.itemsize)
    return BackwardPlan(layout, wide, scratch, sums, settled, differences)


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


def _chunk(layout: Layout, tiles: int) -> int:
    """Tiles that are loaded together: one where the offsets of several rows do not fit 32 bits."""
    return tiles if layout.columns < 2**29 else 1


def _registers(x: Tensor, layout: Layout, mask: Tensor | None, act: Activation | None) -> int:
    """Registers of a thread that a pass over the data is given."""
    if not layout.channels_last:
        return REGISTERS_OF_PLANES
    is_lean = mask is None and x.dtype != torch.float64 and (act is None or is_piecewise_linear(act))
    return REGISTERS if is_lean else MORE_REGISTERS


def kinds_of(tensors: Sequence[Tensor | None], places: Sequence[int | None]) -> list[Any]:
    """Which there are, of what dtype and where, and which of them do not lie on 16 bytes."""
    kinds: list[Any] = [None if tensor is None else (tensor.dtype, tensor.device) for tensor in tensors]
    bits = 0
    for place in places:
        bits |= place or 0
    if bits % ALIGNED:
        kinds += [i for i, place in enumerate(places) if place is not None and place % ALIGNED]
    return kinds


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a few for the interpreter, which has none."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
