"""From our layers back to nn.BatchNorm."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import nn

from .. import layers
from ..fusion.norm_act import NormAct
from ..modules import carry_over
from ..norm import Norm
from ..ops.statistics import merge_running
from .targets import DIMENSIONS


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
