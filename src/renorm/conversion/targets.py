"""From other people's norm layers to ours, and back to nn.BatchNorm: which of them, to which class, with what state."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import layers
from ..fusion.norm_act import ACT_LAYERS, NormAct
from ..layers import BatchGroupNorm, BatchNorm, BatchRenorm, GhostBatchNorm
from ..modules import carry_over
from ..norm import Norm
from ..ops.statistics import merge_running
from ..workers.group import Workers
from .containers import full_name, looks_like_batch_norm
from .options import require_options

_FAMILIES = (BatchNorm, BatchRenorm, GhostBatchNorm, BatchGroupNorm)
DIMENSIONS: dict[type[nn.Module], str] = {
    nn.BatchNorm1d: "1d",
    nn.BatchNorm2d: "2d",
    nn.BatchNorm3d: "3d",
    nn.SyncBatchNorm: "",  # takes any number of dimensions, and so does what replaces it
}
_FROZEN = ("torchvision.ops.misc.FrozenBatchNorm2d", "timm.layers.norm_act.FrozenBatchNormAct2d")
_NO_EQUIVALENT = {
    "timm.layers.split_batchnorm.SplitBatchNorm2d": "it normalizes each part of a batch by a layer of its own, with "
    "its own weight and statistics, which no layer of renorm does",
}
# What torch.nn.utils leave in the place of a parameter that they compute, and what ends it.
_ENDS = {
    "_mask": "torch.nn.utils.prune.remove({layer}, {name!r})",
    "_g": "torch.nn.utils.remove_weight_norm({layer}, {name!r})",
    "_orig": "torch.nn.utils.remove_spectral_norm({layer}, {name!r})",
}

Where = Callable[[str, nn.Module], bool] | str | re.Pattern[str]


def selector(where: Where | None) -> Callable[[str, nn.Module], bool]:
    """Which layers the user wants.

    Args:
        where: a function of name and module, a regular expression searched for in the name, or None for all.

    Returns:
        The function of name and module.
    """
    if where is None:
        return lambda name, module: True
    if isinstance(where, (str, re.Pattern)):
        pattern = re.compile(where)
        return lambda name, module: pattern.search(name) is not None
    return where


def is_candidate(module: nn.Module, to: type[Norm]) -> bool:
    """Whether a user may expect this layer to be converted.

    Args:
        module: any module.
        to: target of the conversion.

    Returns:
        True if it is replaced or, with a warning, passed over.
    """
    return (issubclass(to, BatchGroupNorm) and isinstance(module, nn.GroupNorm)) or looks_like_batch_norm(module)


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is a known frozen batch norm, with weight and bias as buffers.

    Args:
        module: any module.

    Returns:
        True for torchvision's and timm's.
    """
    return full_name(type(module)) in _FROZEN


def target_class(module: nn.Module, to: type[Norm], frozen: bool = False) -> tuple[type[Norm] | None, str]:
    """The class to replace a layer by.

    Args:
        module: a candidate.
        to: target of the conversion, a family or a single class.
        frozen: whether to replace frozen batch norm too.

    Returns:
        The class, or None and the reason for leaving the layer.
    """
    kind = parametrize.type_before_parametrizations(module)
    if isinstance(module, Norm):
        return None, "it is renorm's already (to_batchnorm first)"
    if is_frozen(module) and not frozen:
        return None, "its statistics and weights are meant to be fixed (frozen=True converts it)"
    if _has_activation(module):
        act_layer = ACT_LAYERS.get(to)
        return act_layer, f"there is no {to.__name__} with an activation"
    dimension = "2d" if is_frozen(module) else "" if kind is nn.GroupNorm else DIMENSIONS.get(kind)
    if dimension is None:
        unknown = "its class is not known and may do more than batch norm"
        return None, _NO_EQUIVALENT.get(full_name(kind), unknown)
    if to in _FAMILIES:
        return getattr(layers, to.__name__ + dimension), ""
    if dimension and not set(getattr(layers, "BatchNorm" + dimension).input_ranks) <= set(to.input_ranks):
        return None, f"{to.__name__} does not take {dimension} input"
    return to, ""


def replacement(name: str, old: Any, target: type[Norm], steps: Literal["keep", 0], options: dict[str, Any]) -> Norm:
    """The layer to replace another by, with its very parameters and buffers.

    Args:
        name: of the old layer in the model, for messages.
        old: layer to replace.
        target: class of the new layer.
        steps: "keep" or 0, where the new layer's step starts.
        options: of the target. Without "sync" among them, nn.SyncBatchNorm's goes on: as "batch", or as "running"
            where the target normalizes groups of examples.

    Returns:
        The new layer.

    Raises:
        TypeError: an option that the target needs is missing.
        ValueError: an option does not suit the layer, or its weight is computed by a tool.
    """
    if not is_frozen(old):
        require_parameters(name, old)
    inherited = _inherited(old, target)
    if not _is_corrected(target, options) and hasattr(old, "momentum"):
        inherited["momentum"] = old.momentum
    state = (*old.parameters(recurse=False), *old.buffers(recurse=False))
    try:
        require_options(target, inherited | options)
        new = target(**(inherited | options), device=state[0].device if state else None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot convert {name or 'the root'!r}: {error}") from error
    if "momentum" not in options and new.limits is not None and new.momentum is not None:
        new.momentum = max(new.momentum, new.limits.momentum)  # the default is for long plain phases
    if steps == 0 and new.momentum is None:
        raise ValueError(
            f"cannot convert {name or 'the root'!r}: steps=0 would restart the cumulative average (momentum=None), "
            "which counts with the same step; give a momentum or steps='keep'"
        )
    if isinstance(old, nn.SyncBatchNorm) and "sync" not in options and new.has_statistics:
        new.synchronize("batch" if new.examples_per_group is None else "running", Workers(old.process_group))
    new.affine = is_frozen(old) or old.affine
    new.track_running_stats = getattr(old, "track_running_stats", new.track_running_stats)
    carry_over(old, new)
    if steps == 0 and new.num_batches_tracked is not None:
        new.num_batches_tracked = torch.zeros_like(new.num_batches_tracked)
    return new


def _is_corrected(target: type[Norm], options: dict[str, Any]) -> bool:
    """Whether a layer made of these depends on its running statistics in training too, and wants a small momentum."""
    limits = inspect.signature(target).parameters.get("limits")
    return options.get("limits", None if limits is None else limits.default) is not None


def _inherited(old: Any, target: type[Norm]) -> dict[str, Any]:
    """Options that come from the old layer; its parameters are carried over."""
    inherited: dict[str, Any] = {"eps": old.eps, "affine": False}
    if isinstance(old, nn.GroupNorm):
        inherited |= {"num_features": old.num_channels, "num_groups": old.num_groups}
    elif is_frozen(old):
        inherited |= {"num_features": len(old.running_mean)}
    else:
        inherited |= {"num_features": old.num_features, "track_running_stats": old.running_mean is not None}
    return inherited | {"drop": old.drop, "act": old.act} if issubclass(target, NormAct) else inherited


def require_parameters(name: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight or bias is computed anew in every forward, by pruning, say.

    Args:
        name: of the layer in the model.
        layer: a norm layer.

    Raises:
        ValueError: it is; the message has the call that ends it.
    """
    place = f"model.get_submodule({name!r})"
    for attribute in ("weight", "bias"):
        if parametrize.is_parametrized(layer, attribute):
            end = f"torch.nn.utils.parametrize.remove_parametrizations({place}, {attribute!r})"
        elif attribute in layer._parameters:
            continue
        else:
            kinds = (call for suffix, call in _ENDS.items() if hasattr(layer, attribute + suffix))
            end = next(kinds, "{layer}.{name} = torch.nn.Parameter(...)").format(layer=place, name=attribute)
        raise ValueError(
            f"cannot convert {name or 'the root'!r}: its {attribute} is no parameter but computed from others "
            f"(pruning, parametrization): {end} makes it one"
        )


def _has_activation(module: nn.Module) -> bool:
    """Whether a module is timm's BatchNormAct2d itself, frozen or not; timm is not imported for it."""
    timm_layers = sys.modules.get("timm.layers")
    return timm_layers is not None and type(module) in (timm_layers.BatchNormAct2d, timm_layers.FrozenBatchNormAct2d)


def plain(layer: Norm) -> Any:
    """The nn.BatchNorm that evaluates as a layer does, with its very parameters and buffers.

    Args:
        layer: layer of ours, without obstacles.

    Returns:
        An nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm or, with drop and activation, timm's BatchNormAct2d.

    Warns:
        UserWarning: running statistics had to be rounded to a parameter's half precision.
    """
    settings = (layer.num_features, layer.eps, layer.momentum, False, layer.has_statistics)
    if isinstance(layer, NormAct):
        new = sys.modules["timm.layers"].BatchNormAct2d(*settings)
        new.drop, new.act = layer.drop, layer.act
    else:
        new = _plain_class(layer)(*settings)
    new.affine, new.track_running_stats = layer.affine, layer.track_running_stats
    carry_over(layer, new)
    if layer.has_statistics:
        _fit_statistics(layer, new)
    return new


def _plain_class(layer: Norm) -> type[nn.Module]:
    for plain_class, dimension in DIMENSIONS.items():
        if layer.input_ranks == getattr(layers, "BatchNorm" + dimension).input_ranks:
            return plain_class
    raise AssertionError(layer.input_ranks)


def _fit_statistics(layer: Norm, new: Any) -> None:
    k = layer.channels_per_group
    if k > 1:
        group = merge_running(layer.running_mean, layer.running_var, k)
        new.running_mean, new.running_var = (m[0].repeat_interleave(k) for m in (group.mean, group.var))
    dtype = new.running_mean.dtype if layer.weight is None else layer.weight.dtype
    if dtype.itemsize < new.running_mean.dtype.itemsize:
        warnings.warn(
            f"running statistics are rounded to the weight's {dtype}; model.float() before to_batchnorm keeps them",
            stacklevel=4,
        )
        new.running_mean, new.running_var = new.running_mean.to(dtype), new.running_var.to(dtype)
