"""Changing the norm layers of a model: to ours, and back to nn.BatchNorm."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from . import layers
from .integrations.timm import ACT_LAYERS, NormAct, is_batch_norm_act
from .layers import BatchGroupNorm, BatchNorm, BatchRenorm, GhostBatchNorm
from .norm import Norm
from .ops.statistics import pool_running
from .surgery import carry_over, refuse_wrapped, replace_modules

_FAMILIES = (BatchNorm, BatchRenorm, GhostBatchNorm, BatchGroupNorm)
_DIMENSIONS: dict[type[nn.Module], str] = {
    nn.BatchNorm1d: "1d",
    nn.BatchNorm2d: "2d",
    nn.BatchNorm3d: "3d",
    nn.SyncBatchNorm: "",  # takes any number of dimensions, and so does what replaces it
}
_FIXED_OPTIONS = ("num_features", "affine", "bias", "track_running_stats", "device", "dtype")

Where = Callable[[str, nn.Module], bool] | str | re.Pattern[str]


@dataclass(frozen=True)
class Replacement:
    """A layer that was replaced.

    Args:
        name: its name in the model.
        before: class before.
        after: class after.
        momentum: momentum before and after; None for the cumulative average, and before for group norm.
        note: what else the user should know.
    """

    name: str
    before: str
    after: str
    momentum: tuple[float | None, float | None]
    note: str = ""

    def __str__(self) -> str:
        old, new = self.momentum
        change = "" if old == new else f", momentum {old} -> {new}"
        return f"{self.name or '(root)'}: {self.before} -> {self.after}{change}{self.note and ', ' + self.note}"


@dataclass(frozen=True)
class PassedOver:
    """A norm layer that was left as it is.

    Args:
        name: its name in the model.
        kind: its class.
        reason: why.
    """

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(root)'}: {self.kind} left as it is, {self.reason}"


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did; print it.

    Args:
        replaced: layers replaced, in the order of the model.
        passed_over: norm layers left alone that a user may have expected to change.
    """

    replaced: tuple[Replacement, ...]
    passed_over: tuple[PassedOver, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} layers replaced, {len(self.passed_over)} passed over"]
        return "\n  ".join(lines + [str(row) for row in (*self.replaced, *self.passed_over)])


def _log(report: ConversionReport) -> None:
    logging.getLogger(__name__).info("%s", report)


def convert(
    model: nn.Module,
    to: type[Norm],
    *,
    where: Where | None = None,
    steps: Literal["keep", 0] = "keep",
    report: Callable[[ConversionReport], object] = _log,
    **options: Any,
) -> nn.Module:
    """Replace the batch norm layers of a model, in place.

    Replaced are nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm, timm's BatchNormAct2d (its drop and activation stay) and,
    for `BatchGroupNorm`, nn.GroupNorm. The new layers hold the very same Parameter objects, so an optimizer made
    before stays valid; buffers, dtype, device, mode, requires_grad and hooks are kept, and a layer that is shared
    stays shared. Either everything is replaced or, on an error, nothing.

    Args:
        model: model, not yet wrapped in DDP or FSDP nor compiled; changed in place.
        to: target. A family, as `renorm.BatchRenorm`, picks 1d, 2d or 3d from what it replaces; a single class, as
            `renorm.BatchRenorm2d`, replaces only layers of its dimension.
        where: which layers: a function of name and module, or a regular expression searched for in the name.
        steps: where the limits' step starts. "keep", the default, goes on from the layer's own
            num_batches_tracked: a trained layer's running statistics are good, and corrections may be as large as
            they ever get from the first step; an untrained layer is at 0 anyhow. 0 starts over with plain batch
            norm and ramps up again: for a long further training that will change the statistics much.
        report: called with the `ConversionReport`; try `report=print`. By default it goes to the log, at INFO.
        **options: options of the target. eps and the kind of parameters and buffers come from the replaced layer,
            everything else, the momentum too, is the target's default unless given.

    Returns:
        The model; a new layer if the model itself was one.

    Raises:
        TypeError: `to` is no layer class of renorm.
        ValueError: an option does not suit a layer, which is named; the model is wrapped; `steps=0` meets a
            cumulative average, which counts with the step.

    Warns:
        UserWarning: norm layers were passed over, by name and reason, or nothing was found to replace.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = convert(model, BatchRenorm, report=print)
        1 layers replaced, 0 passed over
          1: BatchNorm2d -> BatchRenorm2d, momentum 0.1 -> 0.01
    """
    _check_arguments(model, to, steps, options)
    selected = _selector(where)
    replacements: dict[nn.Module, nn.Module] = {}
    replaced, passed_over = [], []
    for name, module in model.named_modules():
        if not _is_batch_norm(module, to) or not selected(name, module):
            continue
        target, reason = _target(module, to)
        if target is None:
            passed_over.append(PassedOver(name, type(module).__name__, reason))
            continue
        new = _replacement(name, module, target, steps, options)
        replacements[module] = new
        replaced.append(_describe(name, module, new))
    result = replace_modules(model, replacements)
    done = ConversionReport(tuple(replaced), tuple(passed_over))
    report(done)
    _warn(done)
    return result


def to_batchnorm(model: nn.Module) -> nn.Module:
    """Replace our layers by plain nn.BatchNorm, in place: equal at evaluation, and everything else can load it.

    Parameters are the very same objects. Layers made from nn.SyncBatchNorm or nn.GroupNorm, which take any number of
    dimensions, become nn.SyncBatchNorm; timm's BatchNormAct2d comes back as such. With `channels_per_group` above 1
    every channel gets the running statistics of its group.

    Args:
        model: model, changed in place.

    Returns:
        The model; a new layer if the model itself was one.

    Raises:
        ValueError: nn.BatchNorm cannot do what a layer does, by name and reason. The model is left as it was.

    Warns:
        UserWarning: running statistics had to be rounded to a parameter's half precision.

    Example:
        >>> model = to_batchnorm(nn.Sequential(layers.BatchRenorm2d(8)))
        >>> type(model[0]).__name__
        'BatchNorm2d'
    """
    refuse_wrapped(model)
    ours = [(name, module) for name, module in model.named_modules() if isinstance(module, Norm)]
    obstacles = [f"{name or '(root)'}: {reason}" for name, module in ours if (reason := _obstacle(module))]
    if obstacles:
        raise ValueError("nn.BatchNorm cannot do what these layers do:\n  " + "\n  ".join(obstacles))
    return replace_modules(model, {module: _plain(module) for _, module in ours})


def _check_arguments(model: nn.Module, to: type[Norm], steps: object, options: dict[str, Any]) -> None:
    if not (isinstance(to, type) and issubclass(to, Norm)):
        raise TypeError(f"to must be a layer class of renorm, as renorm.BatchRenorm, got {to!r}")
    if steps not in ("keep", 0):
        raise ValueError(f"steps must be 'keep' or 0, got {steps!r}")
    for option in _FIXED_OPTIONS:
        if option in options:
            raise ValueError(f"{option} comes from the replaced layer and cannot be given, got {options[option]!r}")
    refuse_wrapped(model)


def _selector(where: Where | None) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda name, module: True
    if isinstance(where, (str, re.Pattern)):
        pattern = re.compile(where)
        return lambda name, module: pattern.search(name) is not None
    return where


def _is_batch_norm(module: nn.Module, to: type[Norm]) -> bool:
    """Whether a user may expect this layer to be converted."""
    if issubclass(to, BatchGroupNorm) and isinstance(module, nn.GroupNorm):
        return True
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or hasattr(module, "running_var")


def _target(module: nn.Module, to: type[Norm]) -> tuple[type[Norm] | None, str]:
    """The class to replace a layer by, or the reason for leaving it."""
    if isinstance(module, Norm):
        return None, "it is renorm's already (to_batchnorm first)"
    if is_batch_norm_act(module):
        act_layer = ACT_LAYERS.get(to)
        return act_layer, f"there is no {to.__name__} with an activation"
    dimension = "" if type(module) is nn.GroupNorm else _DIMENSIONS.get(type(module))
    if dimension is None:
        return None, "its class is not known and may do more than batch norm"
    if to in _FAMILIES:
        return getattr(layers, to.__name__ + dimension), ""
    if dimension and not set(getattr(layers, "BatchNorm" + dimension).input_ranks) <= set(to.input_ranks):
        return None, f"{to.__name__} does not take {dimension} input"
    return to, ""


def _replacement(name: str, old: Any, target: type[Norm], steps: Literal["keep", 0], options: dict[str, Any]) -> Norm:
    inherited: dict[str, Any] = {"eps": old.eps, "affine": False}
    if isinstance(old, nn.GroupNorm):
        inherited |= {"num_features": old.num_channels, "num_groups": old.num_groups}
    else:
        inherited |= {"num_features": old.num_features, "track_running_stats": old.running_mean is not None}
    if issubclass(target, NormAct):
        inherited |= {"drop": old.drop, "act": old.act}
    state = (*old.parameters(recurse=False), *old.buffers(recurse=False))
    try:
        new = target(**(inherited | options), device=state[0].device if state else None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot convert {name or 'the root'!r}: {error}") from error
    if steps == 0 and new.momentum is None:
        raise ValueError(
            f"cannot convert {name or 'the root'!r}: steps=0 would restart the cumulative average (momentum=None), "
            "which counts with the same step; give a momentum or steps='keep'"
        )
    new.affine = old.affine
    carry_over(old, new)
    if steps == 0 and new.num_batches_tracked is not None:
        new.num_batches_tracked = torch.zeros_like(new.num_batches_tracked)
    return new


def _describe(name: str, old: nn.Module, new: Norm) -> Replacement:
    note = "no longer synchronized over processes" if isinstance(old, nn.SyncBatchNorm) else ""
    momentum = (getattr(old, "momentum", None), new.momentum)
    return Replacement(name, type(old).__name__, type(new).__name__, momentum, note)


def _warn(report: ConversionReport) -> None:
    if report.passed_over:
        rows = "\n  ".join(map(str, report.passed_over))
        warnings.warn(f"convert passed over {len(report.passed_over)} layers:\n  {rows}", stacklevel=3)
    elif not report.replaced:
        warnings.warn("convert found no batch norm layer to replace", stacklevel=3)


def _obstacle(layer: Norm) -> str:
    """Why nn.BatchNorm cannot do what the layer does at evaluation, if so."""
    if layer.example_weight > 0:
        return f"example_weight={layer.example_weight} is not 0, and set to 0 the outputs change"
    if layer.act is not None and not isinstance(layer, NormAct):
        return f"act={layer.act!r} is applied inside the layer"
    if not layer.track_running_stats and not (layer.examples_per_group is None and layer.channels_per_group == 1):
        return "it evaluates by the statistics of groups (track_running_stats=False)"
    return ""


def _plain(layer: Norm) -> Any:
    settings = (layer.num_features, layer.eps, layer.momentum, False, layer.track_running_stats)
    if isinstance(layer, NormAct):
        new = sys.modules["timm.layers"].BatchNormAct2d(*settings)
        new.drop, new.act = layer.drop, layer.act
    else:
        new = _plain_class(layer)(*settings)
    new.affine = layer.affine
    carry_over(layer, new)
    if layer.track_running_stats:
        _fit_statistics(layer, new)
    return new


def _plain_class(layer: Norm) -> type[nn.Module]:
    for plain, dimension in _DIMENSIONS.items():
        if layer.input_ranks == getattr(layers, "BatchNorm" + dimension).input_ranks:
            return plain
    raise AssertionError(layer.input_ranks)


def _fit_statistics(layer: Norm, new: Any) -> None:
    k = layer.channels_per_group
    if k > 1:
        group = pool_running(layer.running_mean, layer.running_var, k)
        new.running_mean, new.running_var = (m[0].repeat_interleave(k) for m in (group.mean, group.var))
    dtype = new.running_mean.dtype if layer.weight is None else layer.weight.dtype
    if dtype.itemsize < new.running_mean.dtype.itemsize:
        warnings.warn(f"running statistics are rounded to the weight's {dtype}", stacklevel=4)
        new.running_mean, new.running_var = new.running_mean.to(dtype), new.running_var.to(dtype)
