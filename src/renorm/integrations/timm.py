"""timm's BatchNormAct2d, a batch norm with drop and activation inside, with our layers in place of the batch norm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..activation import Activation
from ..fusion.roles import hooked, module_activation
from ..layers import (
    BatchGroupNorm,
    BatchGroupNorm2d,
    BatchNorm,
    BatchNorm2d,
    BatchRenorm,
    BatchRenorm2d,
    GhostBatchNorm,
    GhostBatchNorm2d,
)
from ..norm import Norm


class NormAct(Norm):
    """A norm followed by the modules `drop` and `act`, under timm's names for them.

    Args:
        *args: those of the norm.
        drop: applied to the normalized output; None for nothing.
        act: applied last; None for nothing.
        **options: those of the norm.

    Attributes:
        fused: whether the layer applies the activation itself where it can, instead of calling `act`.
    """

    def __init__(self, *args: Any, drop: nn.Module | None = None, act: nn.Module | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        del self.act  # the name of an activation gives way to the module
        self.drop = drop or nn.Identity()
        self.add_module("act", act or nn.Identity())
        self.fused = False

    def fusable_activation(self) -> Activation | None:
        """The activation, if the layer can apply it itself.

        Returns:
            Its name; None if layers do not have it, if `drop` does something, or if there is a hook on either.
        """
        drop, act = self._modules["drop"], self._modules["act"]  # attributes of modules are slow to find
        if act is None or type(drop) is not nn.Identity or hooked(drop):
            return None
        return module_activation(act)

    def _fused_activation(self) -> Activation | None:
        return self.fusable_activation() if self.fused else None

    def _finish(self, y: Tensor) -> Tensor:
        if self._fused_activation() is not None:
            return y
        activated: Tensor = self.get_submodule("act")(self.drop(y))
        return activated


class BatchNormAct2d(NormAct, BatchNorm2d):
    """`BatchNorm2d` with timm's drop and activation."""


class BatchRenormAct2d(NormAct, BatchRenorm2d):
    """`BatchRenorm2d` with timm's drop and activation."""


class GhostBatchNormAct2d(NormAct, GhostBatchNorm2d):
    """`GhostBatchNorm2d` with timm's drop and activation."""


class BatchGroupNormAct2d(NormAct, BatchGroupNorm2d):
    """`BatchGroupNorm2d` with timm's drop and activation."""


ACT_LAYERS: dict[type[Norm], type[NormAct]] = {
    BatchNorm: BatchNormAct2d,
    BatchNorm2d: BatchNormAct2d,
    BatchRenorm: BatchRenormAct2d,
    BatchRenorm2d: BatchRenormAct2d,
    GhostBatchNorm: GhostBatchNormAct2d,
    GhostBatchNorm2d: GhostBatchNormAct2d,
    BatchGroupNorm: BatchGroupNormAct2d,
    BatchGroupNorm2d: BatchGroupNormAct2d,
}

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


def is_batch_norm_act(module: nn.Module) -> bool:
    """Whether a module is timm's BatchNormAct2d itself; timm is not imported for it.

    Args:
        module: any module.

    Returns:
        True for exactly that class.
    """
    timm_layers = sys.modules.get("timm.layers")
    return timm_layers is not None and type(module) is timm_layers.BatchNormAct2d
