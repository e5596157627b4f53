"""From other people's norm layers to ours: which of them, to which class, with what state."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from .. import layers
from ..fusion.norm_act import ACT_LAYERS, NormAct
from ..layers import BatchGroupNorm, BatchNorm, BatchRenorm, GhostBatchNorm
from ..modules import carry_over
from ..norm import Norm
from ..workers.group import Workers
from .options import require_options

_FAMILIES = (BatchNorm, BatchRenorm, GhostBatchNorm, BatchGroupNorm)
DIMENSIONS: dict[type[nn.Module], str] = {
    nn.BatchNorm1d: "1d",
    nn.BatchNorm2d: "2d",
    nn.BatchNorm3d: "3d",
    nn.SyncBatchNorm: "",  # takes any number of dimensions, and so does what replaces it
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
    if issubclass(to, BatchGroupNorm) and isinstance(module, nn.GroupNorm):
        return True
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or hasattr(module, "running_var")


def target_class(module: nn.Module, to: type[Norm]) -> tuple[type[Norm] | None, str]:
    """The class to replace a layer by.

    Args:
        module: a candidate.
        to: target of the conversion, a family or a single class.

    Returns:
        The class, or None and the reason for leaving the layer.
    """
    if isinstance(module, Norm):
        return None, "it is renorm's already (to_batchnorm first)"
    if _is_batch_norm_act(module):
        act_layer = ACT_LAYERS.get(to)
        return act_layer, f"there is no {to.__name__} with an activation"
    dimension = "" if type(module) is nn.GroupNorm else DIMENSIONS.get(type(module))
    if dimension is None:
        return None, "its class is not known and may do more than batch norm"
    if to in _FAMILIES:
        return getattr(layers, to.__name__ + dimension), ""
    if dimension and not set(getattr(layers, "BatchNorm" + dimension).input_ranks) <= set(to.input_ranks):
        return None, f"{to.__name__} does not take {dimension} input"
    return to, ""


def replacement(name: str, old: Any, target: type[Norm], steps: Literal["keep", 0], options: dict[str, Any]) -> Norm:
    """The layer to replace another by, with its very parameters and buffers.

    Args:
        name: of the old layer, for messages.
        old: layer to replace.
        target: class of the new layer.
        steps: "keep" or 0, where the new layer's step starts.
        options: of the target. Without "sync" among them, nn.SyncBatchNorm's goes on: as "batch", or as "running"
            where the target normalizes groups of examples.

    Returns:
        The new layer.

    Raises:
        TypeError: an option that the target needs is missing.
        ValueError: an option does not suit the layer.
    """
    inherited: dict[str, Any] = {"eps": old.eps, "affine": False}
    if isinstance(old, nn.GroupNorm):
        inherited |= {"num_features": old.num_channels, "num_groups": old.num_groups}
    else:
        inherited |= {"num_features": old.num_features, "track_running_stats": old.running_mean is not None}
    if issubclass(target, NormAct):
        inherited |= {"drop": old.drop, "act": old.act}
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
    new.affine = old.affine
    new.track_running_stats = getattr(old, "track_running_stats", new.track_running_stats)
    carry_over(old, new)
    if steps == 0 and new.num_batches_tracked is not None:
        new.num_batches_tracked = torch.zeros_like(new.num_batches_tracked)
    return new


def _is_batch_norm_act(module: nn.Module) -> bool:
    """Whether a module is timm's BatchNormAct2d itself; timm is not imported for it."""
    timm_layers = sys.modules.get("timm.layers")
    return timm_layers is not None and type(module) is timm_layers.BatchNormAct2d
