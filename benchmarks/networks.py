"""The networks whose training steps are timed, and their variants with other norm layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torchvision
from torch import Tensor, nn

import renorm
from contenders import (
    BATCH_NORM,
    BATCH_NORM_COMPILED,
    OURS,
    OURS_COMPILED,
    OURS_FUSED,
    OURS_FUSED_COMPILED,
    PLAIN,
    PlainBatchRenorm2d,
)
from renorm_lab.networks.models import resnet

# From the network with nn.BatchNorm2d to a variant of it.
Change = Callable[[nn.Module], nn.Module]

_CLASSES = 128  # every image of a batch has a class of its own


@dataclass(frozen=True)
class Network:
    """A network and its input.

    Args:
        name: of the network.
        build: makes it, with nn.BatchNorm2d.
        batch: images of a step.
        size: height and width of an image.
        barred: whether a bar is set for it, so that it is measured in every setting.
        compiled: whether its compiled variants are measured too.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: int
    size: int
    barred: bool = False
    compiled: bool = False


def resnet18_cifar() -> nn.Module:
    """ResNet-18 for images of 32x32: no early downsampling, so that its layers are 32, 16, 8 and 4 wide."""
    model: nn.Module = torchvision.models.resnet18(num_classes=_CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def resnet20_cifar() -> nn.Module:
    """The lab's ResNet-20."""
    return resnet(20, 3, _CLASSES, nn.BatchNorm2d)


def _timm(name: str) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=_CLASSES)


NETWORKS = (
    Network("ResNet-18 CIFAR", resnet18_cifar, 32, 32, barred=True),
    Network("ResNet-20 CIFAR", resnet20_cifar, 128, 32, barred=True, compiled=True),
    Network("mobilenetv2_100", _timm("mobilenetv2_100"), 16, 224, barred=True),
    Network("efficientnet_b0", _timm("efficientnet_b0"), 8, 224),
    Network("ResNet-50", _timm("resnet50"), 4, 224),
    Network("Inception-v3", _timm("inception_v3"), 4, 299),
)
QUICK_NETWORKS = (Network("ResNet-20 CIFAR", resnet20_cifar, 2, 32, barred=True),)


def ours(model: nn.Module) -> nn.Module:
    """The network with our layers, one for one."""
    return renorm.convert(model, renorm.BatchRenorm, limits=renorm.Limits.constant())


def ours_fused(model: nn.Module) -> nn.Module:
    """The network with our layers, which also add residuals and apply activations."""
    return renorm.convert(model, renorm.BatchRenorm, fuse=True, limits=renorm.Limits.constant())


def plain(model: nn.Module) -> nn.Module:
    """The network with batch renorm as people write it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _plain_layer(child))
    return model


def _plain_layer(layer: nn.BatchNorm2d) -> nn.Module:
    """timm's BatchNormAct2d, which is an nn.BatchNorm2d, keeps its activation."""
    norm = PlainBatchRenorm2d(layer.num_features)
    act = getattr(layer, "act", None)
    return norm if act is None else nn.Sequential(norm, act)


class Whole(nn.Module):
    """A network as one call: what is called first is compiled, unless it is torch's, as nn.Sequential is.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """The network's output."""
        y: Tensor = self.network(x)
        return y


def compiled(change: Change) -> Change:
    """The variant under torch.compile, without falling back to eager anywhere."""

    def change_and_compile(model: nn.Module) -> nn.Module:
        whole = Whole(change(model))
        whole.compile(fullgraph=True, dynamic=False)
        return whole

    return change_and_compile


VARIANTS: dict[str, Change] = {
    BATCH_NORM: lambda model: model,
    PLAIN: plain,
    OURS: ours,
    OURS_FUSED: ours_fused,
}
COMPILED: dict[str, Change] = {
    BATCH_NORM_COMPILED: compiled(VARIANTS[BATCH_NORM]),
    OURS_COMPILED: compiled(ours),
    OURS_FUSED_COMPILED: compiled(ours_fused),
}
