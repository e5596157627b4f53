"""The operations on a GPU: what to launch for which tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...activation import Activation
from ...grouping import Grouping
from ...moments import Moments, accumulation_dtype
from ..problem import Correction, Inputs, Running, RunningState, Settings, Target
from ..schema import Saved
from ..tracking import Rule
from . import backward, forward, settle
from .activation import CODES
from .moments import BATCH, COEFFICIENTS, GIVEN, MEASURED, RENORM, RUNNING, WEIGHED
from .tiles import Cut, Layout, tiles, whole_channels
from .tracking import move

_INTERPRETED_PROCESSORS = 1


def _on_its_device(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: let it be that of the first tensor."""

    @wraps(operation)
    def call(first: Any, *rest: Any) -> Any:
        tensor: Tensor = first if isinstance(first, Tensor) else first[0]
        if tensor.device.type != "cuda":  # interpreted
            return operation(first, *rest)
        with torch.cuda.device(tensor.device):
            return operation(first, *rest)

    return call


class _Kept(NamedTuple):
    """What a training forward leaves of its groups."""

    mean: Tensor | None  # (G, C)
    var: Tensor | None  # (G, C)
    count: Tensor | None  # type: ignore[assignment]  # (G, 1)
    coefficients: Tensor | None  # (COEFFICIENTS, G, C)


class _Numbers(NamedTuple):
    """What scale and offset are made of, as the kernels take it."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    r: Tensor | None = None
    d: Tensor | None = None
    r_max: float | Tensor = 1.0
    d_max: float | Tensor = 0.0
    example_weight: float = 0.0


@_on_its_device
def normalize(
    inputs: Inputs, settings: Settings, correction: Target | Correction | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """renorm::normalize, see `ops.schema`."""
    return _normalize(inputs, settings, correction)


def _normalize(
    inputs: Inputs, settings: Settings, correction: Target | Correction | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = inputs._replace(x=dense(inputs.x))
    x, weight, bias, *_ = inputs
    layout = Layout.of(x, settings.grouping)
    wide = accumulation_dtype(x.dtype)
    statistics = x.new_empty((2, layout.groups, layout.channels), dtype=wide)
    count = x.new_empty((layout.groups, 1), dtype=wide)
    coefficients = x.new_empty((COEFFICIENTS, layout.groups, layout.channels), dtype=wide)
    kept = _Kept(statistics[0], statistics[1], count, coefficients)
    numbers, source = _Numbers(weight, bias), BATCH
    if isinstance(correction, Correction):
        numbers, source = _Numbers(weight, bias, r=correction.r, d=correction.d), GIVEN
    elif correction is not None:
        r_max, d_max = _limits(correction.r_max, correction.d_max)
        numbers = _Numbers(weight, bias, correction.mean, correction.var, r_max=r_max, d_max=d_max)
        source = RENORM
    y = _forward(inputs, settings, layout, numbers, source, kept)
    return y, statistics[0], statistics[1], count, coefficients


@_on_its_device
def normalize_and_track(
    inputs: Inputs, settings: Settings, state: RunningState, limits: tuple[Any, Any] | None, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """renorm::normalize_and_track, see `ops.schema`."""
    target = None if limits is None else Target(state.mean, state.var, *limits)
    y, mean, var, count, coefficients = _normalize(inputs, settings, target)
    move(state, Moments(mean, var, count), rule, settings)
    return y, count, coefficients


@_on_its_device
def track(state: RunningState, moments: Moments, rule: Rule, settings: Settings) -> None:
    """renorm::track, see `ops.schema`."""
    move(state, moments, rule, settings)


@_on_its_device
def evaluate(inputs: Inputs, settings: Settings, running: Running, example_weight: float) -> Tensor:
    """renorm::evaluate, see `ops.schema`."""
    inputs = inputs._replace(x=dense(inputs.x))
    x, weighed = inputs.x, example_weight > 0
    grouping = replace(settings.grouping, examples_per_group=1 if weighed else None)
    layout = Layout.of(x, grouping)
    coefficients = None
    if layout.channels_per_group > 1:
        wide = accumulation_dtype(x.dtype)
        coefficients = x.new_empty((COEFFICIENTS, layout.groups, layout.channels), dtype=wide)
    numbers = _Numbers(inputs.weight, inputs.bias, *running, example_weight=example_weight)
    kept = _Kept(None, None, None, coefficients)
    return _forward(inputs, settings, layout, numbers, WEIGHED if weighed else RUNNING, kept)


def _forward(inputs: Inputs, settings: Settings, layout: Layout, numbers: _Numbers, source: int, kept: _Kept) -> Tensor:
    x, weight, bias, mask, residual = inputs
    mask, residual = _bytes_of(mask), None if residual is None else laid_out_as(x, residual)
    y = torch.empty_like(x)
    options = {
        "EPS": settings.eps, "SOURCE": source, "WEIGHT": weight is not None, "BIAS": bias is not None,
        "LIMITS_IN_MEMORY": isinstance(numbers.r_max, Tensor), "KEEPS": kept.mean is not None,
    }  # fmt: skip
    output = {"RESIDUAL": residual is not None, "ACT": CODES[settings.act]}
    shape = (layout.examples, layout.channels, layout.positions, layout.examples_per_group, layout.groups)
    cut = whole_channels(layout)
    if cut is not None and source != RUNNING:
        forward.apply_whole[cut.blocks * layout.groups,](
            x, mask, residual, y, *kept, *numbers, *shape, **options, **output, **_tiling(x, layout, cut, mask)
        )
        return y
    cut = tiles(layout, processors(x.device))
    tiling = _tiling(x, layout, cut, mask)
    splits = triton.next_power_of_2(cut.splits)
    measured = None
    if source != RUNNING:
        wide = accumulation_dtype(x.dtype)
        measured = x.new_empty((MEASURED, layout.groups, cut.splits, layout.channels), dtype=wide)
        forward.measure[cut.blocks * layout.groups, cut.splits](
            x, mask, measured, *shape, cut.tiles, cut.splits, **tiling
        )
    settled = layout.channels_per_group > 1
    if settled:
        k = layout.channels_per_group
        settle.settle[layout.channels // k * layout.groups,](
            measured, *kept, *numbers, layout.channels, layout.groups, cut.splits, k, **options, SPLITS=splits,
            BK=min(settle.BLOCK, triton.next_power_of_2(k)), ACC=tiling["ACC"],
        )  # fmt: skip
    programs = _programs(layout, cut, x.device)
    forward.apply[cut.blocks * layout.groups, programs](
        x, mask, residual, y, measured, *kept, *numbers, *shape, cut.tiles, cut.splits, programs, **options, **output,
        SETTLED=settled, SPLITS=splits, **tiling,
    )  # fmt: skip
    return y


class _Backward(NamedTuple):
    """What a backward reads, in x's layout, and what it writes."""

    dy: Tensor
    x: Tensor
    mask: Tensor | None
    residual: Tensor | None
    y: Tensor | None
    coefficients: Tensor
    count: Tensor  # type: ignore[assignment]
    weight: Tensor | None
    dx: Tensor
    dresidual: Tensor
    gradients: Tensor  # of weight and bias, by group, (2, G, C)

    @property
    def read(self) -> tuple[Tensor | None, ...]:
        return self.dy, self.x, self.mask, self.residual, self.y, self.coefficients

    @property
    def written(self) -> tuple[Tensor, ...]:
        return self.dx, self.dresidual, self.gradients


@_on_its_device
def normalize_backward(
    dy: Tensor, saved: Saved, grouping: Grouping, act: Activation | None, wants_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """renorm::normalize_backward, see `ops.schema`."""
    x = dense(saved.x)
    residual, y = (None if tensor is None else laid_out_as(x, tensor) for tensor in (saved.residual, saved.y))
    layout = Layout.of(x, grouping)
    gradients = x.new_empty((2, layout.groups, layout.channels), dtype=accumulation_dtype(x.dtype))
    tensors = _Backward(
        laid_out_as(x, dy), x, _bytes_of(saved.mask), residual, y, saved.coefficients, saved.count, saved.weight,
        torch.empty_like(x), torch.empty_like(x) if wants_residual else x.new_empty(0), gradients,
    )  # fmt: skip
    options = {"RESIDUAL": residual is not None, "FROM_Y": y is not None, "ACT": CODES[act]}
    outputs = {"WEIGHT": saved.weight is not None, "WANTS_RESIDUAL": wants_residual}
    cut = whole_channels(layout)
    if cut is not None:
        shape = (layout.examples, layout.channels, layout.positions, layout.examples_per_group, layout.groups)
        backward.differentiate_whole[cut.blocks * layout.groups,](
            *tensors.read, tensors.count, tensors.weight, *tensors.written, *shape, **options, **outputs,
            **_tiling(x, layout, cut, tensors.mask),
        )  # fmt: skip
    else:
        _backward_in_two(tensors, layout, options, outputs)
    dweight, dbias = gradients[:, 0] if layout.groups == 1 else gradients.sum(1)
    return tensors.dx, dweight, dbias, tensors.dresidual


def _backward_in_two(tensors: _Backward, layout: Layout, options: dict[str, Any], outputs: dict[str, Any]) -> None:
    x, gradients = tensors.x, tensors.gradients
    shape = (layout.examples, layout.channels, layout.positions, layout.examples_per_group, layout.groups)
    cut = tiles(layout, processors(x.device))
    tiling = _tiling(x, layout, cut, tensors.mask)
    splits = triton.next_power_of_2(cut.splits)
    measured = gradients.new_empty((3, layout.groups, cut.splits, layout.channels))
    backward.sum_gradients[cut.blocks * layout.groups, cut.splits](
        *tensors.read, measured, *shape, cut.tiles, cut.splits, **options, **tiling
    )
    slopes = None
    k = layout.channels_per_group
    if k > 1:
        slopes = gradients.new_empty((3, layout.groups, layout.channels))
        settle.settle_backward[layout.channels // k * layout.groups,](
            measured, tensors.count, tensors.coefficients, tensors.weight, slopes, gradients, layout.channels,
            layout.groups, cut.splits, k,
            WEIGHT=outputs["WEIGHT"], SPLITS=splits, BK=min(settle.BLOCK, triton.next_power_of_2(k)), ACC=tiling["ACC"],
        )  # fmt: skip
    programs = _programs(layout, cut, x.device)
    backward.differentiate[cut.blocks * layout.groups, programs](
        *tensors.read, measured, tensors.count, tensors.weight, slopes, *tensors.written, *shape, cut.tiles,
        cut.splits, programs, SETTLED=k > 1, SPLITS=splits, **options, **outputs, **tiling,
    )  # fmt: skip


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


def _limits(r_max: Tensor, d_max: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """The limits as numbers where the host knows them, else where the device has them."""
    if r_max.is_cpu and d_max.is_cpu:
        return float(r_max), float(d_max)
    device = d_max.device if r_max.is_cpu else r_max.device
    return r_max.to(device), d_max.to(device)


def _bytes_of(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _programs(layout: Layout, cut: Cut, device: torch.device) -> int:
    """Programs that share the second pass over a channel in a group."""
    wanted = -(-16 * processors(device) // (cut.blocks * layout.groups))
    return max(1, min(wanted, cut.tiles, 1024))


def _tiling(x: Tensor, layout: Layout, cut: Cut, mask: Tensor | None) -> dict[str, Any]:
    return {
        "CHANNELS_LAST": layout.channels_last, "E": cut.elements, "BC": cut.channels, "RUN": cut.run,
        "MASKED": mask is not None, "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": cut.warps,
    }  # fmt: skip
