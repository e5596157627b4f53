"""A small U-Net, which says how far its outputs look."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 3
_CONV_MARGIN = 1  # of a convolution of 3 x 3
_ENCODER_CONVS, _DECODER_CONVS = 2, 1


class UNet(nn.Module):
    """Three levels of N, 2N and 4N channels, two convolutions down and one up, a normalization layer after each.

    Args:
        in_channels: channels of the input.
        num_classes: channels of the output.
        width: N.
        norm: makes a normalization layer from a number of channels.

    Source:
        Ronneberger et al. 2015, "U-Net", smaller, with padded convolutions and nearest neighbours on the way up.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        widths = [width << level for level in range(_LEVELS)]
        self.down = nn.ModuleList(
            _convolutions(before, after, _ENCODER_CONVS, norm)
            for before, after in zip([in_channels, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            _convolutions(here + below, here, _DECODER_CONVS, norm) for here, below in pairwise(widths)
        )
        self.head = nn.Conv2d(width, num_classes, 1)

    @property
    def step(self) -> int:
        """Pixels by which an image may be shifted so that outputs shift along: those of a pixel of the last level."""
        return int(2 ** len(self.up))

    @property
    def margin(self) -> int:
        """The receptive field's radius: an output depends on no pixel further away, up, down, left or right.

        A convolution looks 1 pixel far at its own level. Half the resolution makes that twice as far, and 1 pixel more,
        since an output may lie at either side of the pair that became one.

        Example:
            >>> UNet(1, 2, 4, nn.BatchNorm2d).margin
            20
        """
        reach = _ENCODER_CONVS * _CONV_MARGIN
        for _ in self.up:
            reach = (_ENCODER_CONVS + _DECODER_CONVS) * _CONV_MARGIN + 2 * reach + 1
        return reach

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel.

        Args:
            x: (N, C, H, W); height and width are multiples of `step`.

        Returns:
            (N, num_classes, H, W).
        """
        passed = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            passed.append(x)
        for block, beside in zip(reversed(self.up), reversed(passed[:-1]), strict=True):
            x = block(torch.cat([beside, F.interpolate(x, scale_factor=2.0, mode="nearest")], 1))
        logits: Tensor = self.head(x)
        return logits


def _convolutions(in_channels: int, channels: int, number: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(number):
        conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, norm(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers)
