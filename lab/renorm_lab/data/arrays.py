"""Images as the readers deliver them, and what must hold of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import LabError

Array = NDArray[Any]


class Arrays(NamedTuple):
    """Images and labels of a data set.

    Args:
        x_train: (N, H, W, C), uint8.
        y_train: (N,), integers from 0.
        x_test: (M, H, W, C), uint8.
        y_test: (M,), integers from 0.
    """

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array


def check_arrays(arrays: Arrays, source: str) -> None:
    """Refuse what cannot be trained on.

    Args:
        arrays: images and labels.
        source: file or folder they come from, for the message.

    Raises:
        LabError: a shape or type is wrong, a label is out of range, or a class is empty.
    """
    check_shapes(arrays, source)
    _check_classes(arrays, source)


def check_shapes(arrays: Arrays, source: str) -> None:
    """Refuse arrays that are no images or labels.

    Args:
        arrays: images and labels.
        source: file or folder they come from, for the message.

    Raises:
        LabError: a shape or type is wrong.
    """
    for part in ("train", "test"):
        _check_part(getattr(arrays, f"x_{part}"), getattr(arrays, f"y_{part}"), part, source)
    if arrays.x_train.shape[1:] != arrays.x_test.shape[1:]:
        raise LabError(
            f"{source}: images of x_train and x_test must have one shape, "
            f"got {arrays.x_train.shape[1:]} and {arrays.x_test.shape[1:]}"
        )


def _check_part(x: Array, y: Array, part: str, source: str) -> None:
    if x.dtype != np.uint8 or x.ndim != 4 or x.size == 0:
        raise LabError(f"{source}: x_{part} must be uint8 of shape (N, H, W, C), got {x.dtype} of shape {x.shape}")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise LabError(
            f"{source}: y_{part} must be integers of shape ({len(x)},), one for each image, "
            f"got {y.dtype} of shape {y.shape}"
        )
    if int(y.max()) > np.iinfo(np.int64).max:
        raise LabError(f"{source}: y_{part} must be labels that int64 holds, got {y.max()}")


def _check_classes(arrays: Arrays, source: str) -> None:
    num_classes = int(arrays.y_train.max()) + 1
    for part, y in (("train", arrays.y_train), ("test", arrays.y_test)):
        if y.min() < 0 or y.max() >= num_classes:
            raise LabError(
                f"{source}: y_{part} has labels out of range: from {y.min()} to {y.max()}, "
                f"where the training labels allow 0 to {num_classes - 1}"
            )
    classes = np.unique(arrays.y_train)
    empty = num_classes - len(classes)  # which may be billions
    if empty:
        first = int((classes != np.arange(len(classes))).argmax())
        raise LabError(f"{source}: class {first} has no training image ({empty} of {num_classes} are empty)")
