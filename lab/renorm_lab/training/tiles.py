"""Scenes in overlapping tiles: cut, predicted each by itself, put together, and compared where they overlap."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Predictions = Tensor  # probabilities, (N, R, K, classes, T, T): R x K tiles of T x T pixels of each of N scenes


class Mismatch(NamedTuple):
    """How far two tiles disagree about the same pixels.

    Args:
        probability: half the sum over classes of the absolute difference of probabilities, mean over pixels, in [0, 1].
        labels: share of the pixels to which the two give different labels.
    """

    probability: float
    labels: float


def cut(images: Tensor, size: int, stride: int) -> Tensor:
    """The tiles of images.

    Args:
        images: (N, *, H, W); `stride` divides H - size and W - size.
        size: height and width of a tile.
        stride: from a tile to the next.

    Returns:
        (N, R, K, *, size, size).

    Example:
        >>> cut(torch.zeros(2, 3, 256, 256), 64, 48).shape
        torch.Size([2, 5, 5, 3, 64, 64])
    """
    tiles: Tensor = images.unfold(-2, size, stride).unfold(-2, size, stride)
    return tiles.movedim((-4, -3), (1, 2))


def by_tiles(model: nn.Module, images: Tensor, size: int, stride: int, batch_size: int) -> Predictions:
    """What a network says of each tile, in the mode that it is in.

    Args:
        model: from (B, C, size, size) to logits, (B, classes, size, size).
        images: (N, C, H, W).
        size: height and width of a tile.
        stride: from a tile to the next.
        batch_size: tiles in a forward, from anywhere in all images, so that neighbours share none but by chance.

    Returns:
        Probabilities.
    """
    tiles = cut(images, size, stride)
    flat = tiles.flatten(0, 2)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0)).to(flat.device)
    drawn = torch.cat([model(flat[some]).float().softmax(1) for some in order.split(batch_size)])
    in_place: Tensor = drawn[order.argsort()].unflatten(0, tiles.shape[:3])
    return in_place


def stitched(predicted: Predictions, stride: int) -> Tensor:
    """The whole scenes, with the mean of all tiles that have a pixel, as MONAI's sliding_window_inference has it.

    Args:
        predicted: probabilities.
        stride: from a tile to the next.

    Returns:
        Probabilities, (N, classes, H, W).
    """
    size = predicted.shape[-1]
    height, width = ((number - 1) * stride + size for number in predicted.shape[1:3])

    def added(tiles: Tensor) -> Tensor:
        return F.fold(tiles.flatten(1, 2).flatten(2).transpose(1, 2), (height, width), size, stride=stride)

    return added(predicted) / added(torch.ones_like(predicted))


def mismatch(predicted: Predictions, stride: int, margin: int) -> Mismatch:
    """The disagreement of neighbouring tiles about pixels that see neither tile's border.

    Where a network's output depends on nothing but its receptive field it is zero by construction; what is left comes
    from statistics that are those of a tile.

    Args:
        predicted: probabilities.
        stride: from a tile to the next, a multiple of the step by which the network's outputs shift along.
        margin: pixels at a tile's border that are left out, the radius of the receptive field.

    Returns:
        The mean over all pairs, side by side and one above the other.

    Raises:
        ValueError: tiles overlap by so little that no pixel is left.

    Source:
        Buglakova et al. 2025 (arXiv 2503.19545), the tile mismatch.
    """
    size = predicted.shape[-1]
    if size - stride <= 2 * margin:
        raise ValueError(f"tiles must overlap by more than {2 * margin} pixels, got {size - stride}")
    first, second = slice(stride + margin, size - margin), slice(margin, size - stride - margin)
    across = slice(margin, size - margin)
    pairs = (
        (predicted[:, :-1, :, :, first, across], predicted[:, 1:, :, :, second, across]),
        (predicted[:, :, :-1, :, across, first], predicted[:, :, 1:, :, across, second]),
    )
    distances = torch.cat([(one - other).abs().sum(3).flatten() / 2 for one, other in pairs])
    differing = torch.cat([(one.argmax(3) != other.argmax(3)).flatten() for one, other in pairs])
    return Mismatch(float(distances.mean()), float(differing.float().mean()))


def foreground_in_empty_tiles(predicted: Predictions, labels: Tensor, stride: int) -> float:
    """The share of pixels that are taken for something in tiles where there is nothing.

    Args:
        predicted: probabilities.
        labels: (N, H, W), 0 for nothing.
        stride: from a tile to the next.

    Returns:
        In [0, 1]; 0 where no tile is empty.
    """
    empty = (cut(labels, predicted.shape[-1], stride) == 0).all(-1).all(-1)
    found = predicted[empty].argmax(1) != 0
    return float(found.float().mean()) if len(found) else 0.0
