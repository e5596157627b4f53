"""Tools that put another layer in a layer's place read its attributes, and lose what these do not say.

They cannot be told otherwise than by what they read. All of them need eps; so whoever reads it is looked at.
"""

from __future__ import annotations

import re
from types import FrameType
from typing import Any

# Functions of torch, apex, timm, detectron2, mmcv and those who copy them.
_SYNCHRONIZE = re.compile(r"(convert|revert)\w*sync")
_FREEZE = re.compile(r"freeze\w*(bn|norm)|convert\w*frozen")
# What a function reads in order to make another batch norm, or to make a layer's scale and shift by itself.
_REPLACES = {
    "num_features", "eps", "momentum", "affine", "track_running_stats", "running_var", "num_batches_tracked",
}  # fmt: skip
_FOLDS = {"eps", "running_var", "weight"}


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
    if reads >= _REPLACES and loses and caller.f_locals.get("self") is not layer:
        raise RuntimeError(
            f"{function} would replace {kind} by another batch norm without its settings: call it before "
            "renorm.convert, or after renorm.to_batchnorm(model), which says what is lost"
        )
    if reads >= _FOLDS and caller.f_locals.get("self") is not layer:  # a subclass may compute by what is its own
        reason = obstacle(layer)
        if layer.channels_per_group > 1:
            reason = "channels share their statistics; renorm.to_batchnorm(model) gives each its own"
        if reason:
            raise RuntimeError(f"{function} takes {kind} for a scale and a shift by its running statistics: {reason}")


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
