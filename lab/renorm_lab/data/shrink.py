"""Smaller images, for trainings that take a fraction of the time."""

from __future__ import annotations

import numpy as np
import torch

from .arrays import Array, Arrays

_CHUNK = 4_096  # images resized at once, to save memory


def shrunk(arrays: Arrays, size: int) -> Arrays:
    """Resize and crop images to squares, unless they are as small already.

    Args:
        arrays: images and labels.
        size: height and width in pixels.

    Returns:
        The same labels, and images of shape (N, size, size, C), or as they were where height or width is no larger.
    """
    height, width = arrays.x_train.shape[1:3]
    if min(height, width) <= size:
        return arrays
    return arrays._replace(x_train=_resized(arrays.x_train, size), x_test=_resized(arrays.x_test, size))


def _resized(images: Array, size: int) -> Array:
    from torchvision.transforms import v2

    cut = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    chunks = torch.from_numpy(images).permute(0, 3, 1, 2).split(_CHUNK)
    return np.concatenate([cut(chunk).permute(0, 2, 3, 1).numpy() for chunk in chunks])
