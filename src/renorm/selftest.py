"""Layers as they run here, against the definition in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .grouping import Grouping
from .limits import Limits
from .norm import Norm
from .ops import reference
from .ops.problem import Inputs, Settings, Target
from .ops.tracking import update_running

# Largest error, in units of the largest number or of 1: some roundings of the dtype.
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

_LAYOUTS = {"(N, C)": ((28, 6), False), "NCHW": ((28, 6, 7, 5), False), "NHWC": ((28, 6, 7, 5), True)}
# Every group has enough elements, also masked ones, for a variance that rounding in float32 does not matter to.
_GROUPINGS = {
    "batch": Grouping(), "groups of examples": Grouping(8), "groups of channels": Grouping(None, 3),
    "groups of both": Grouping(12, 2),
}  # fmt: skip
_EPS = 1e-5


@dataclass(frozen=True)
class Result:
    """The largest error over all cases of a dtype.

    Args:
        dtype: of the input.
        cases: how many there were.
        error: the largest; infinite where a case did not run.
        worst: the case it was in, and in what.
    """

    dtype: torch.dtype
    cases: int
    error: float
    worst: str

    @property
    def bound(self) -> float:
        """What the error may be."""
        return BOUNDS[self.dtype]

    @property
    def passed(self) -> bool:
        """Whether the error is within it."""
        return self.error <= self.bound


class _Case(NamedTuple):
    """Settings of a layer and its input.

    Args:
        dtype: of the input.
        device: where the layer runs.
        layout: name of the input's shape and order in memory.
        grouping: name of which elements share statistics.
        corrected: whether by batch renormalization.
        masked: whether some elements do not count.
    """

    dtype: torch.dtype
    device: torch.device
    layout: str
    grouping: str
    corrected: bool
    masked: bool

    def __str__(self) -> str:
        return f"{self.layout}, {self.grouping}{', corrected' * self.corrected}{', masked' * self.masked}"


def selftest(device: torch.device | str = "cpu") -> list[Result]:
    """Compare layers on a device with `ops.reference` in float64: output, gradients and running statistics.

    Over dtypes, layouts, groupings, with and without batch renormalization's correction and a mask.

    Args:
        device: where the layers run.

    Returns:
        A result for each dtype.

    Example:
        >>> all(result.passed for result in selftest())
        True
    """
    return [_of_dtype(dtype, torch.device(device)) for dtype in BOUNDS]


def _of_dtype(dtype: torch.dtype, device: torch.device) -> Result:
    cases = [
        _Case(dtype, device, *rest) for rest in itertools.product(_LAYOUTS, _GROUPINGS, (False, True), (False, True))
    ]
    error, worst = 0.0, ""
    for case in cases:
        for what, found in _errors(case):
            if not found <= error:  # NaN is larger than anything
                error, worst = (found if found == found else float("inf")), f"{case}: {what}"
    return Result(dtype, len(cases), error, worst)


def _errors(case: _Case) -> Iterator[tuple[str, float]]:
    try:
        actual, expected = _run(case)
    except Exception as error:  # whatever it is that does not run, the other cases should
        yield f"{type(error).__name__}: {error}", float("inf")
        return
    for name, exact in expected.items():
        size = max(1.0, float(exact.abs().max()))
        yield name, float((actual[name].cpu().double() - exact).abs().max()) / size


def _run(case: _Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the layer gives, and what it should."""
    (shape, channels_last), grouping = _LAYOUTS[case.layout], _GROUPINGS[case.grouping]
    dtype, device = case.dtype, case.device
    random = torch.Generator("cpu").manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64, device="cpu")

    channels = shape[1]
    limits = Limits.constant(r_max=1.3, d_max=0.4) if case.corrected else None
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    layer = Norm(
        channels, _EPS, device=device, dtype=parameter_dtype, limits=limits, momentum=0.5,
        examples_per_group=grouping.examples_per_group, channels_per_group=grouping.channels_per_group,
    )  # fmt: skip
    tensors: list[Any] = [layer.weight, layer.bias, layer.running_mean]
    for tensor in tensors:
        tensor.data.copy_(numbers(channels))
    x, dy = ((numbers(*shape) * 2 + 1).to(device, dtype), numbers(*shape).to(device, dtype))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    positions = shape[0], *shape[2:]
    mask = (torch.arange(math.prod(positions), device="cpu") % 5 > 0).view(positions) if case.masked else None
    expected = _expected(layer, x, dy, mask, grouping)
    y = layer(x.requires_grad_(), None if mask is None else mask.to(device))
    dx, dweight, dbias = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    actual = {
        "output": y, "gradient of x": dx, "gradient of gamma": dweight, "gradient of beta": dbias,
        "running mean": layer.running_mean, "running variance": layer.running_var,
    }  # fmt: skip
    return {name: tensor.detach() for name, tensor in actual.items()}, expected


def _expected(layer: Norm, x: Tensor, dy: Tensor, mask: Tensor | None, grouping: Grouping) -> dict[str, Tensor]:
    tensors: list[Any] = [x, dy, layer.weight, layer.bias, layer.running_mean, layer.running_var]
    x, dy, weight, bias, mean, var = (tensor.detach().cpu().double() for tensor in tensors)
    limits = layer.limits
    target = None if limits is None else Target(mean, var, limits.r_max, limits.d_max)
    inputs, settings = Inputs(x, weight, bias, mask), Settings(grouping, _EPS)
    with torch.no_grad():
        y, moments, correction = reference.forward(inputs, settings, target)
        gradients = reference.backward(dy, inputs, settings, moments, correction)
        running_mean, running_var = update_running(
            mean, var, moments,
            momentum=0.5, tracking=layer.tracking, channels_per_group=grouping.channels_per_group, eps=_EPS,
        )  # fmt: skip
    return {
        "output": y, "gradient of x": gradients.x, "gradient of gamma": gradients.weight,
        "gradient of beta": gradients.bias, "running mean": running_mean, "running variance": running_var,
    }  # fmt: skip
