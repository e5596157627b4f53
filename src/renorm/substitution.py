"""Tools that put another layer in a layer's place read its attributes, and lose what these do not say.

They cannot be told otherwise than by what they read. All of them need eps; so whoever reads it is looked at.
"""

from __future__ import annotations

import re
from types import FrameType
from typing import Any

# Functions of torch, apex, timm, detectron2, ultralytics, mmcv and those who copy them.
_SYNCHRONIZE = re.compile(r"_*(convert|revert)\w*sync")
_FREEZE = re.compile(r"_*(un)?freeze\w*(bn|norm)|_*convert\w*frozen")
_FOLD = re.compile(r"_*(fuse|fold|merge|absorb)\w*(bn|norm)")


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
    function, kind = caller.f_code.co_name, type(layer).__name__
    if _SYNCHRONIZE.match(function):
        raise RuntimeError(
            f"{function} would replace {kind} by a synchronized batch norm without its settings: call "
            'renorm.synchronize(model, "batch") instead, and leave sync_batchnorm=True out'
        )
    if _FREEZE.match(function) and (trains_otherwise(layer) or obstacle(layer)):
        raise RuntimeError(
            f"{function} would replace {kind} by a frozen batch norm, and that by nn.BatchNorm, without its settings: "
            'set layer.frozen = "running" instead'
        )
    if _FOLD.match(function):
        reason = obstacle(layer)
        if layer.channels_per_group > 1:
            reason = "channels share their statistics; renorm.to_batchnorm(model) gives each its own"
        if reason:
            raise RuntimeError(f"{function} cannot fold {kind} into the layer before it: {reason}")
