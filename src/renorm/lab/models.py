"""Networks small enough for a CPU, each built around a given normalization layer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]
ModelName = Literal["mlp", "resnet8", "resnet20"]


def build_model(name: str, image_shape: tuple[int, int, int], num_classes: int, norm: Norm) -> nn.Module:
    """A network with fresh weights.

    Args:
        name: one of `ModelName`.
        image_shape: channels, height and width of the input.
        num_classes: number of outputs.
        norm: makes a normalization layer from a number of channels.

    Returns:
        A network from images, (N, C, H, W), to logits, (N, num_classes).
    """
    channels, height, width = image_shape
    if name == "mlp":
        return mlp(channels * height * width, num_classes, norm)
    return resnet(int(name.removeprefix("resnet")), channels, num_classes, norm)


def mlp(in_features: int, num_classes: int, norm: Norm, *, hidden_layers: int = 4, width: int = 128) -> nn.Module:
    """A perceptron with a normalization layer after every hidden linear layer.

    Args:
        in_features: number of input values of an example.
        num_classes: number of outputs.
        norm: makes a normalization layer from a number of channels.
        hidden_layers: number of hidden layers.
        width: units of a hidden layer.

    Returns:
        A network from (N, *) with `in_features` values to (N, num_classes).
    """
    widths = [in_features] + [width] * hidden_layers
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), norm(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))


def resnet(depth: int, in_channels: int, num_classes: int, norm: Norm) -> nn.Module:
    """The residual network for CIFAR: three stages of 16, 32 and 64 channels (neither timm nor torchvision has it).

    Args:
        depth: number of weight layers, 6n + 2 for n blocks a stage.
        in_channels: channels of the input.
        num_classes: number of outputs.
        norm: makes a normalization layer from a number of channels.

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
            layers.append(_Block(channels, stage_channels, norm))
            channels = stage_channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.stride = channels // in_channels
        self.added_channels = channels - in_channels
        self.conv1 = _conv(in_channels, channels, self.stride)
        self.norm1 = norm(channels)
        self.conv2 = _conv(channels, channels)
        self.norm2 = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))
        return F.relu(y + shortcut)


def _conv(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
