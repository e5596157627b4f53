"""Tools that put another layer in a layer's place read its attributes, and lose what these do not say.

They cannot be told otherwise than by what they read. Nearly all of them need eps; so whoever reads it is looked at.
"""

from __future__ import annotations

import re
import warnings
from types import FrameType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# Functions of torch, apex, timm, detectron2, mmcv and those who copy them.
_SYNCHRONIZE = re.compile(r"(convert|revert)\w*sync")
_FREEZE = re.compile(r"freeze\w*(bn|norm)|convert\w*frozen")
# What a function names in order to make another batch norm; to call torch's with a layer's numbers; and to make the
# layer's scale and shift by itself.
_REPLACES = ({"num_features", "eps"}, {"type", "eps", "momentum"}, {"__class__", "eps", "momentum"})
_CALLS_TORCHS = {"batch_norm", "running_mean", "running_var", "momentum", "eps"}
_FOLDS = {"eps", "running_var", "weight"}
_A_CLASS = re.compile("Norm|BN|cls")  # in the name of what takes the layer's place

# Classes of torch whose forward a patch may replace, and what it was when renorm was imported.
_TORCHS = (_BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TORCHS_FORWARD = _BatchNorm.forward


def obstacle(layer: Any) -> str:
    """Why no fixed scale and shift does what a layer of ours does at evaluation.

    Args:
        layer: of ours.

    Returns:
        The reason; empty if one does.
    """
    if layer.example_weight > 0:
        return (
            f"example_weight={layer.example_weight} weighs every example's own statistics in, which no fixed scale and "
            "shift can; to fold, quantize or export as batch norm, set it to 0, which changes outputs"
        )
    if isinstance(layer.act, str):
        return f"act={layer.act!r} is applied inside the layer"
    if not layer.has_statistics and not (layer.examples_per_group is None and layer.channels_per_group == 1):
        return "it evaluates by the statistics of groups (track_running_stats=False)"
    return ""


def trains_otherwise(layer: Any) -> bool:
    """Whether a layer of ours is not nn.BatchNorm by another name.

    Args:
        layer: of ours.

    Returns:
        True if training by nn.BatchNorm would not be the same.
    """
    grouped = layer.examples_per_group is not None or layer.channels_per_group > 1
    settings = (layer.limits, layer.act, layer.sync, layer.frozen)
    return grouped or layer.tracking != "var" or any(setting is not None for setting in settings)


def refuse_substitution(layer: Any, caller: FrameType) -> None:
    """Refuse that a layer of ours is replaced by one that does not do what it does.

    Args:
        layer: of ours.
        caller: who reads its eps.

    Raises:
        RuntimeError: a known kind of tool does, and something would be lost.
    """
    code, kind = caller.f_code, type(layer).__name__
    function, reads = getattr(code, "co_qualname", code.co_name), {*code.co_names}  # Python 3.10 has no qualified one
    if caller.f_globals.get("__name__", "").startswith("renorm."):
        return
    if _SYNCHRONIZE.search(code.co_name):
        raise RuntimeError(
            f"{function} would replace {kind} by a synchronized batch norm without its settings: call "
            'renorm.synchronize(model, "batch") instead, and leave sync_batchnorm=True out'
        )
    loses = trains_otherwise(layer) or bool(obstacle(layer))
    if _FREEZE.search(code.co_name) and loses:
        raise RuntimeError(
            f"{function} would replace {kind} by a frozen batch norm, and that by nn.BatchNorm, without its settings: "
            'set layer.frozen = "running" instead'
        )
    if caller.f_locals.get("self") is layer:  # a subclass may compute by what is its own
        return
    if loses and reads >= _CALLS_TORCHS:
        raise RuntimeError(
            f"{function} calls torch's batch_norm with the numbers of {kind}, which leaves out its settings: call the "
            "layer itself, layer(x), or take renorm.to_batchnorm(model), which says what is lost"
        )
    folds = reads >= _FOLDS and not any(_A_CLASS.search(name) for name in (*reads, *code.co_freevars))
    if loses and any(reads >= names for names in _REPLACES) and not folds:
        raise RuntimeError(
            f"{function} would replace {kind} by another batch norm without its settings: call it before "
            "renorm.convert, or after renorm.to_batchnorm(model), which says what is lost"
        )
    if reads >= _FOLDS:
        reason = obstacle(layer)
        if layer.channels_per_group > 1:
            reason = "channels share their statistics; renorm.to_batchnorm(model) gives each its own"
        if reason:
            raise RuntimeError(f"{function} takes {kind} for a scale and a shift by its running statistics: {reason}")


def warn_of_patches(layer: Any) -> None:
    """Warn that a replaced forward of nn.BatchNorm is not that of our layers.

    Args:
        layer: of ours, called.
    """
    for torchs in _TORCHS:
        if torchs.forward is not _TORCHS_FORWARD:
            kind = type(layer).__name__
            warnings.warn(
                f"{torchs.__name__}.forward was replaced, and {kind} does not call it, having a forward of its own: "
                f"take renorm.to_batchnorm(model), or replace {kind}.forward",
                stacklevel=5,
            )
            return


def refuse_single_examples(layer: Any, caller: FrameType) -> None:
    """Refuse hooks for the gradients of single examples.

    Opacus refuses a layer with buffers itself, and takes one without for a layer that does not mix examples.

    Args:
        layer: of ours.
        caller: who registers a hook.

    Raises:
        RuntimeError: Opacus does.
    """
    if caller.f_globals.get("__name__", "").startswith("opacus."):
        raise RuntimeError(
            f"opacus takes gradients of single examples, and {type(layer).__name__} normalizes by all of them: replace "
            "it by a layer that does not, as ModuleValidator.fix(renorm.to_batchnorm(model)) does"
        )
