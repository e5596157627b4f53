"""The operations on a GPU: what to launch for which tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backward, forward, settle
from .activation import CODES
from .moments import BATCH, COEFFICIENTS, GIVEN, MEASURED, RENORM, RUNNING, WEIGHED
from .tiles import Cut, Layout, tiles, whole_channels
from .tracking import track

_INTERPRETED_PROCESSORS = 1


def normalize(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """renorm::normalize, see `ops.schema`."""
    source = GIVEN if r is not None else BATCH if running_mean is None else RENORM
    x = dense(x)
    layout = Layout.of(x, examples_per_group, channels_per_group)
    wide = accumulation_dtype(x)
    statistics = x.new_empty((2, layout.groups, layout.channels), dtype=wide)
    count = x.new_empty((layout.groups, 1), dtype=wide)
    coefficients = x.new_empty((COEFFICIENTS, layout.groups, layout.channels), dtype=wide)
    y = torch.empty_like(x)
    kept = (statistics[0], statistics[1], count, coefficients)
    rule = (weight, bias, running_mean, running_var, r, d, *_limits(r_max, d_max), 0.0)
    _forward(x, mask, residual, y, kept, rule, source, layout, eps, act, keeps=True)
    return y, *kept


def normalize_and_track(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    steps: Tensor,
    skipped: Tensor,
    r_max: Tensor | None,
    d_max: Tensor | None,
    examples_per_group: int | None,
    channels_per_group: int,
    eps: float,
    act: str,
    tracking: str,
    momentum: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """renorm::normalize_and_track, see `ops.schema`."""
    running = (None, None) if r_max is None else (running_mean, running_var)
    y, mean, var, count, coefficients = normalize(
        x, weight, bias, mask, residual, running[0], running[1], r_max, d_max, None, None, examples_per_group,
        channels_per_group, eps, act,
    )  # fmt: skip
    state = (running_mean, running_var, steps, skipped)
    track(*state, mean, var, count, tracking, momentum, channels_per_group, eps)
    return y, count, coefficients


def evaluate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    example_weight: float,
    channels_per_group: int,
    eps: float,
    act: str,
) -> Tensor:
    """renorm::evaluate, see `ops.schema`."""
    x = dense(x)
    weighed = example_weight > 0
    layout = Layout.of(x, 1 if weighed else None, channels_per_group)
    y = torch.empty_like(x)
    coefficients = None
    if channels_per_group > 1:
        coefficients = x.new_empty((COEFFICIENTS, layout.groups, layout.channels), dtype=accumulation_dtype(x))
    rule = (weight, bias, running_mean, running_var, None, None, 1.0, 0.0, example_weight)
    kept = (None, None, None, coefficients)
    _forward(x, mask, residual, y, kept, rule, WEIGHED if weighed else RUNNING, layout, eps, act, keeps=False)
    return y


def _forward(
    x: Tensor, mask: Tensor | None, residual: Tensor | None, y: Tensor, kept: tuple[Tensor | None, ...],
    rule: tuple[Any, ...], source: int, layout: Layout, eps: float, act: str, keeps: bool,
) -> None:  # fmt: skip
    mask, residual = _bytes_of(mask), None if residual is None else laid_out_as(x, residual)
    weight, bias, *_, limit, _, _ = rule
    options = {
        "EPS": eps, "SOURCE": source, "WEIGHT": weight is not None, "BIAS": bias is not None,
        "LIMITS_IN_MEMORY": isinstance(limit, Tensor), "KEEPS": keeps,
    }  # fmt: skip
    output = {"RESIDUAL": residual is not None, "ACT": CODES[act]}
    shape = (layout.examples, layout.channels, layout.positions, layout.examples_per_group, layout.groups)
    cut = whole_channels(layout)
    if cut is not None and source != RUNNING:
        forward.apply_whole[cut.blocks * layout.groups,](
            x, mask, residual, y, *kept, *rule, *shape, **options, **output, **_tiling(x, layout, cut, mask)
        )
        return
    cut = tiles(layout, processors(x.device))
    tiling = _tiling(x, layout, cut, mask)
    splits = triton.next_power_of_2(cut.splits)
    measured = None
    if source != RUNNING:
        measured = x.new_empty((MEASURED, layout.groups, cut.splits, layout.channels), dtype=accumulation_dtype(x))
        forward.measure[cut.blocks * layout.groups, cut.splits](
            x, mask, measured, *shape, cut.tiles, cut.splits, **tiling
        )
    settled = layout.channels_per_group > 1
    if settled:
        k = layout.channels_per_group
        settle.settle[layout.channels // k * layout.groups,](
            measured, *kept, *rule, layout.channels, layout.groups, cut.splits, k, **options, SPLITS=splits,
            BK=min(settle.BLOCK, triton.next_power_of_2(k)), ACC=tiling["ACC"],
        )  # fmt: skip
    programs = _programs(layout, cut, x.device)
    forward.apply[cut.blocks * layout.groups, programs](
        x, mask, residual, y, measured, *kept, *rule, *shape, cut.tiles, cut.splits, programs, **options, **output,
        SETTLED=settled, SPLITS=splits, **tiling,
    )  # fmt: skip


def normalize_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    count: Tensor,
    coefficients: Tensor,
    examples_per_group: int | None,
    channels_per_group: int,
    act: str,
    wants_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """renorm::normalize_backward, see `ops.schema`."""
    x = dense(x)
    dy, mask = laid_out_as(x, dy), _bytes_of(mask)
    residual, y = (None if tensor is None else laid_out_as(x, tensor) for tensor in (residual, y))
    layout = Layout.of(x, examples_per_group, channels_per_group)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if wants_residual else x.new_empty(0)
    gradients = x.new_empty((2, layout.groups, layout.channels), dtype=accumulation_dtype(x))
    inputs = (dy, x, mask, residual, y, coefficients)
    options = {"RESIDUAL": residual is not None, "FROM_Y": y is not None, "ACT": CODES[act]}
    outputs = {"WEIGHT": weight is not None, "WANTS_RESIDUAL": wants_residual}
    shape = (layout.examples, layout.channels, layout.positions, layout.examples_per_group, layout.groups)
    cut = whole_channels(layout)
    if cut is not None:
        backward.differentiate_whole[cut.blocks * layout.groups,](
            *inputs, count, weight, dx, dresidual, gradients, *shape, **options, **outputs,
            **_tiling(x, layout, cut, mask),
        )  # fmt: skip
    else:
        _backward_in_two(inputs, count, weight, dx, dresidual, gradients, layout, shape, options, outputs)
    dweight, dbias = gradients[:, 0] if layout.groups == 1 else gradients.sum(1)
    return dx, dweight, dbias, dresidual


def _backward_in_two(
    inputs: tuple[Any, ...], count: Tensor, weight: Tensor | None, dx: Tensor, dresidual: Tensor, gradients: Tensor,
    layout: Layout, shape: tuple[int, ...], options: dict[str, Any], outputs: dict[str, Any],
) -> None:  # fmt: skip
    x, mask = inputs[1], inputs[2]
    cut = tiles(layout, processors(x.device))
    tiling = _tiling(x, layout, cut, mask)
    splits = triton.next_power_of_2(cut.splits)
    measured = gradients.new_empty((3, layout.groups, cut.splits, layout.channels))
    backward.sum_gradients[cut.blocks * layout.groups, cut.splits](
        *inputs, measured, *shape, cut.tiles, cut.splits, **options, **tiling
    )
    slopes = None
    k = layout.channels_per_group
    if k > 1:
        slopes = gradients.new_empty((3, layout.groups, layout.channels))
        settle.settle_backward[layout.channels // k * layout.groups,](
            measured, count, inputs[-1], weight, slopes, gradients, layout.channels, layout.groups, cut.splits, k,
            WEIGHT=outputs["WEIGHT"], SPLITS=splits, BK=min(settle.BLOCK, triton.next_power_of_2(k)), ACC=tiling["ACC"],
        )  # fmt: skip
    programs = _programs(layout, cut, x.device)
    backward.differentiate[cut.blocks * layout.groups, programs](
        *inputs, measured, count, weight, slopes, dx, dresidual, gradients, *shape, cut.tiles, cut.splits, programs,
        SETTLED=k > 1, SPLITS=splits, **options, **outputs, **tiling,
    )  # fmt: skip


def dense(x: Tensor) -> Tensor:
    """x itself where memory holds it contiguously or with channels last, else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def laid_out_as(x: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in x's memory layout."""
    if tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x).copy_(tensor)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The type of sums and statistics."""
    return torch.promote_types(x.dtype, torch.float32)


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a few for the interpreter, which has none."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _limits(r_max: Tensor | None, d_max: Tensor | None) -> tuple[float | Tensor, float | Tensor]:
    """The limits as numbers where the host knows them, else where the device has them."""
    if r_max is None or d_max is None:
        return 1.0, 0.0
    if r_max.is_cpu and d_max.is_cpu:
        return float(r_max), float(d_max)
    return r_max, d_max


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
