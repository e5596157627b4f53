"""Networks, each built around a given normalization layer: small ones of our own, and those of timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

import renorm

from .library import library_model
from .unet import UNet

Norm = Callable[[int], nn.Module]

_HIDDEN_LAYERS, _WIDTH = 4, 128  # of the perceptron


def build_model(
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    norm: partial[renorm.Norm],
    *,
    pretrained: bool = False,
) -> nn.Module:
    """A network.

    Args:
        name: mlp, resnet18, resnetN or plainN with N = 8, 14, 20, ..., unetN with N channels at the top, timm/NAME or
            torchvision/NAME.
        image_shape: channels, height and width of the input.
        num_classes: number of outputs.
        norm: class and options of the normalization layers, called with a number of channels.
        pretrained: whether to start from timm's weights, but for the last layer; otherwise from fresh ones.

    Returns:
        A network from images, (N, C, H, W), to logits, (N, num_classes), or (N, num_classes, H, W) of unetN.

    Raises:
        ValueError: there is no such network or no such weights, or an option does not suit it.
    """
    if "/" in name:
        return library_model(name, image_shape, num_classes, norm, pretrained)
    if pretrained:
        raise ValueError(f"pretrained weights are timm's: model must be timm/NAME, got {name}")
    channels, height, width = image_shape
    if name == "mlp":
        return mlp(channels * height * width, num_classes, norm)
    if name == "resnet18":
        return resnet18(channels, num_classes, norm)
    kind = name.rstrip("0123456789")
    if kind not in ("resnet", "plain", "unet") or not name.removeprefix(kind).strip("0"):
        raise ValueError(
            f"model must be mlp, resnet18, resnetN or plainN (N = 8, 14, 20, ...), unetN, timm/NAME or "
            f"torchvision/NAME, got {name}"
        )
    if kind == "unet":
        return UNet(channels, num_classes, int(name.removeprefix(kind)), norm)
    return resnet(int(name.removeprefix(kind)), channels, num_classes, norm, shortcuts=kind == "resnet")


def mlp(in_features: int, num_classes: int, norm: Norm) -> nn.Module:
    """A perceptron of 4 hidden layers of 128 units, each with a normalization layer after it.

    Args:
        in_features: number of input values of an example.
        num_classes: number of outputs.
        norm: makes a normalization layer from a number of channels.

    Returns:
        A network from (N, *) with `in_features` values to (N, num_classes).
    """
    widths = [in_features] + [_WIDTH] * _HIDDEN_LAYERS
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), norm(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))


def resnet(depth: int, in_channels: int, num_classes: int, norm: Norm, *, shortcuts: bool = True) -> nn.Module:
    """The residual network for CIFAR: three stages of 16, 32 and 64 channels (neither timm nor torchvision has it).

    Args:
        depth: number of weight layers, 6n + 2 for n blocks a stage.
        in_channels: channels of the input.
        num_classes: number of outputs.
        norm: makes a normalization layer from a number of channels.
        shortcuts: whether there are any; without, every path to the output leads through all later normalization
            layers.

    Returns:
        A network from (N, in_channels, H, W) to (N, num_classes).

    Raises:
        ValueError: the depth is not 6n + 2.

    Source:
        He et al. 2016, section 4.2, with parameter-free shortcuts (option A).
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(f"depth must be 8, 14, 20, ... (6n + 2), got {depth}")
    layers: list[nn.Module] = [_conv(in_channels, 16), norm(16), nn.ReLU()]
    channels = 16
    for stage_channels in (16, 32, 64):
        for _ in range(blocks):
            shortcut = _Padding(channels, stage_channels) if shortcuts else None
            layers.append(_Block(channels, stage_channels, norm, shortcut))
            channels = stage_channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def resnet18(in_channels: int, num_classes: int, norm: Norm) -> nn.Module:
    """The residual network of 18 layers with 64, 128, 256 and 512 channels, as it is used for small images.

    Args:
        in_channels: channels of the input.
        num_classes: number of outputs.
        norm: makes a normalization layer from a number of channels.

    Returns:
        A network from (N, in_channels, H, W) to (N, num_classes).

    Source:
        Summers & Dinneen 2020, section 4.1; He et al. 2016, with a first convolution of 3 x 3 and without pooling,
        and projections where the shape changes (option B).
    """
    layers: list[nn.Module] = [_conv(in_channels, 64), norm(64), nn.ReLU()]
    channels = 64
    for stage_channels in (64, 128, 256, 512):
        for _ in range(2):
            changes = channels != stage_channels
            shortcut = _projection(channels, stage_channels, norm) if changes else nn.Identity()
            layers.append(_Block(channels, stage_channels, norm, shortcut))
            channels = stage_channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, norm: Norm, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, channels // in_channels)
        self.norm1 = norm(channels)
        self.conv2 = _conv(channels, channels)
        self.norm2 = norm(channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y if self.shortcut is None else y + self.shortcut(x))


class _Padding(nn.Module):
    """A shortcut without parameters, which leaves out pixels and adds channels of zeros."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride = channels // in_channels
        self.added_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))


def _projection(in_channels: int, channels: int, norm: Norm) -> nn.Module:
    return nn.Sequential(_conv(in_channels, channels, channels // in_channels, kernel_size=1), norm(channels))


def _conv(in_channels: int, channels: int, stride: int = 1, kernel_size: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
