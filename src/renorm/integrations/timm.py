"""timm's models: our layers where its constructors make batch norm, drop and activation in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..fusion.norm_act import (
    ACT_LAYERS,
    BatchGroupNormAct2d,
    BatchNormAct2d,
    BatchRenormAct2d,
    GhostBatchNormAct2d,
    NormAct,
)
from ..norm import Norm

__all__ = ["BatchGroupNormAct2d", "BatchNormAct2d", "BatchRenormAct2d", "GhostBatchNormAct2d", "norm_act"]

_TIMM_OPTIONS = ("apply_act", "act_layer", "act_kwargs", "inplace", "drop_layer")


def norm_act(layer: type[Norm], **options: Any) -> Callable[..., NormAct]:
    """What timm's constructors take as `norm_layer` where they make norm and activation in one.

    These know timm's own classes, and functions, whose activation is theirs: give `act_layer`, unless it is ReLU.
    Elsewhere (ResNets) the class itself does.

    Args:
        layer: class of renorm, for 2d input.
        **options: of the layer, and of timm's BatchNormAct2d, such as `act_layer`; what the constructor asks for
            comes first.

    Returns:
        A function of the number of channels and options of timm's BatchNormAct2d.

    Raises:
        ValueError: there is no such layer with an activation.

    Example:
        >>> import timm, renorm
        >>> layer = norm_act(renorm.BatchRenorm2d, limits=renorm.Limits.over(1_000), act_layer="silu")
        >>> model = timm.create_model("test_efficientnet", norm_layer=layer)
        >>> model.bn1.act
        SiLU(inplace=True)
    """
    target = ACT_LAYERS.get(layer)
    if target is None:
        raise ValueError(f"layer must be one of {', '.join(known.__name__ for known in ACT_LAYERS)}, got {layer!r}")

    def make(num_features: int, *args: Any, **given: Any) -> NormAct:
        from timm.layers.norm_act import BatchNormAct2d as TimmsOwn

        asked = options | given
        of_timm = {name: asked.pop(name) for name in _TIMM_OPTIONS if name in asked}
        template = TimmsOwn(num_features, **of_timm)  # for its drop and activation
        return target(num_features, *args, drop=template.drop, act=template.act, **asked)

    return make
