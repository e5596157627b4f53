"""The operations that torch knows of: their signatures, and the lists of arguments that stand for the house's terms.

Only here are the terms of `problem` flattened to what torch's operations take, and read back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activation import Activation
from ..grouping import Grouping
from ..moments import Moments
from ..transforms import unwatched
from .problem import Correction, Inputs, Running, RunningState, Settings, Target
from .tracking import Rule

_INPUTS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? mask, Tensor? residual"
_SETTINGS = "int? examples_per_group, int channels_per_group, float eps, str act"
_NORMALIZE = (
    f"({_INPUTS}, Tensor? running_mean, Tensor? running_var, Tensor? r_max, Tensor? d_max, Tensor? r, Tensor? d, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_SIGNATURES = {
    "normalize": _NORMALIZE,
    # The same without a registered gradient, for the autograd.Function of eager mode: torch asks Python for the
    # gradient of the other at every call.
    "normalize_eager": _NORMALIZE,
    "normalize_backward": (
        "(Tensor dy, Tensor x, Tensor? weight, Tensor? mask, Tensor? residual, Tensor? y, Tensor count, "
        "Tensor coefficients, int? examples_per_group, int channels_per_group, str act, bool wants_residual) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "evaluate": (
        f"({_INPUTS}, Tensor running_mean, Tensor running_var, float example_weight, int channels_per_group, "
        "float eps, str act) -> Tensor"
    ),
    "track": (
        "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) steps, Tensor(d!) skipped, Tensor mean, "
        "Tensor var, Tensor count, str tracking, float? momentum, int channels_per_group, float eps) -> ()"
    ),
}


class Coefficients(NamedTuple):
    """What the kernels keep for the backward pass, the rows of a tensor: y = (x - center) * scale + offset, (G, C)."""

    center: Tensor
    scale: Tensor
    offset: Tensor
    r: Tensor
    d: Tensor
    inverse_sigma: Tensor


class Saved(NamedTuple):
    """What the backward pass needs of a forward.

    Args:
        x: input.
        weight: gamma, or None.
        bias: beta, for a second backward; None for the operation, which does not need it.
        mask: (N, *S), or None.
        residual: where the activation's gradient is computed from it, else None.
        y: output, where the activation's gradient is computed from it, else None.
        count: elements of each group, (G, 1).
        coefficients: see `Coefficients`, (6, G, C).
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    residual: Tensor | None
    y: Tensor | None
    count: Tensor  # type: ignore[assignment]  # hides a method of tuples that nobody calls here
    coefficients: Tensor


class NormalizeArguments(NamedTuple):
    """Those of renorm::normalize."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    residual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    r_max: Tensor | None
    d_max: Tensor | None
    r: Tensor | None
    d: Tensor | None
    examples_per_group: int | None
    channels_per_group: int
    eps: float
    act: Any

    @classmethod
    def of(cls, inputs: Inputs, settings: Settings, correction: Target | Correction | None) -> tuple[Any, ...]:
        if correction is None:
            return (*inputs, None, None, None, None, None, None, *_flat(settings))
        if isinstance(correction, Correction):
            return (*inputs, None, None, None, None, *correction, *_flat(settings))
        mean, var, r_max, d_max = correction
        device = inputs.x.device
        return (*inputs, mean, var, _as_tensor(r_max, device), _as_tensor(d_max, device), None, None, *_flat(settings))

    def read(self) -> tuple[Inputs, Settings, Target | Correction | None]:
        correction: Target | Correction | None = None
        if self.r is not None and self.d is not None:
            correction = Correction(self.r, self.d)
        elif self.running_mean is not None and self.running_var is not None:
            correction = Target(self.running_mean, self.running_var, self.r_max, self.d_max)
        inputs = Inputs(self.x, self.weight, self.bias, self.mask, self.residual)
        return inputs, _settings(self.examples_per_group, self.channels_per_group, self.eps, self.act), correction


class BackwardArguments(NamedTuple):
    """Those of renorm::normalize_backward."""

    dy: Tensor
    x: Tensor
    weight: Tensor | None
    mask: Tensor | None
    residual: Tensor | None
    y: Tensor | None
    count: Tensor  # type: ignore[assignment]  # hides a method of tuples that nobody calls here
    coefficients: Tensor
    examples_per_group: int | None
    channels_per_group: int
    act: Any
    wants_residual: bool

    @classmethod
    def of(cls, dy: Tensor, saved: Saved, settings: Settings, wants_residual: bool) -> tuple[Any, ...]:
        x, weight, _, mask, residual, y, count, coefficients = saved
        examples_per_group, channels_per_group, _, act = _flat(settings)
        return (
            dy, x, weight, mask, residual, y, count, coefficients, examples_per_group, channels_per_group, act,
            wants_residual,
        )  # fmt: skip

    def read(self) -> tuple[Tensor, Saved, Grouping, Activation | None, bool]:
        saved = Saved(self.x, self.weight, None, self.mask, self.residual, self.y, self.count, self.coefficients)
        grouping = Grouping(self.examples_per_group, self.channels_per_group)
        return self.dy, saved, grouping, None if self.act == "none" else self.act, self.wants_residual


class EvaluateArguments(NamedTuple):
    """Those of renorm::evaluate."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    residual: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    example_weight: float
    channels_per_group: int
    eps: float
    act: Any

    @classmethod
    def of(cls, inputs: Inputs, settings: Settings, running: Running, example_weight: float) -> tuple[Any, ...]:
        _, channels_per_group, eps, act = _flat(settings)
        return (*inputs, *running, example_weight, channels_per_group, eps, act)

    def read(self) -> tuple[Inputs, Settings, Running, float]:
        inputs = Inputs(self.x, self.weight, self.bias, self.mask, self.residual)
        settings = _settings(None, self.channels_per_group, self.eps, self.act)
        return inputs, settings, Running(self.running_mean, self.running_var), self.example_weight


class TrackArguments(NamedTuple):
    """Those of renorm::track."""

    running_mean: Tensor
    running_var: Tensor
    steps: Tensor
    skipped: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # hides a method of tuples that nobody calls here
    tracking: Any
    momentum: float | None
    channels_per_group: int
    eps: float

    @classmethod
    def of(cls, state: RunningState, moments: Moments, rule: Rule, settings: Settings) -> tuple[Any, ...]:
        return (*state, *moments, *rule, settings.grouping.channels_per_group, settings.eps)

    def read(self) -> tuple[RunningState, Moments, Rule, Settings]:
        state = RunningState(self.running_mean, self.running_var, self.steps, self.skipped)
        moments = Moments(self.mean, self.var, self.count)
        settings = _settings(None, self.channels_per_group, self.eps, "none")
        return state, moments, Rule(self.tracking, self.momentum), settings


def _flat(settings: Settings) -> tuple[int | None, int, float, str]:
    grouping, eps, act = settings
    return grouping.examples_per_group, grouping.channels_per_group, eps, act or "none"


def _settings(examples_per_group: int | None, channels_per_group: int, eps: float, act: Any) -> Settings:
    return Settings(Grouping(examples_per_group, channels_per_group), eps, None if act == "none" else act)


def _as_tensor(limit: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(limit, Tensor):
        return limit
    if torch.compiler.is_compiling():  # where x is: a graph of launches has no place for the host's tensors
        return torch.full((), limit, dtype=torch.float64, device=device)
    return _constant(limit)


@lru_cache(maxsize=64)
@unwatched()
def _constant(value: float) -> Tensor:
    # All layers have the same limits at a step, and a tensor costs more than finding it.
    return torch.tensor(value, dtype=torch.float64, device="cpu")


_ARGUMENTS: dict[str, Any] = {
    "normalize": NormalizeArguments,
    "normalize_eager": NormalizeArguments,
    "normalize_backward": BackwardArguments,
    "evaluate": EvaluateArguments,
    "track": TrackArguments,
}


def implement(device: str, module: str) -> None:
    """Let the functions of a module be the operations on a kind of device.

    Args:
        device: torch's name of its type.
        module: path of the module, imported at the first call, with `normalize`, `normalize_backward`, `evaluate`
            and `track`, which take what `read` of the arguments above returns.
    """
    for name, arguments in _ARGUMENTS.items():
        function = name.removesuffix("_eager")
        LIBRARY.impl(name, _imported_at_first_call(module, function, arguments), device.upper())


def _imported_at_first_call(module: str, function: str, arguments: Any) -> Callable[..., Any]:
    def call(*flat: Any) -> Any:
        return getattr(import_module(module), function)(*arguments(*flat).read())

    return call


def _define() -> torch.library.Library:
    library = torch.library.Library("renorm", "FRAGMENT")
    for name, signature in _SIGNATURES.items():
        # The kernels take memory as it lies: a compiler that chose channels_last need not copy to what it traced.
        library.define(name + signature, tags=(torch.Tag.flexible_layout,))
    return library


LIBRARY = _define()  # torch forgets the operations of a library that is gone
