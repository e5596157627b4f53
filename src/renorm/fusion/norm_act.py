"""timm's BatchNormAct2d, a batch norm with drop and activation inside, with our layers in place of the batch norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..activation import Activation
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
from .roles import hooked, module_activation


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
