"""Readers: one function for each kind of source, all of which deliver `Arrays`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from ..errors import LabError
from .arrays import Array, Arrays
from .split import split_test


def read_digits() -> Arrays:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn comes with; a fixed quarter of them is the test part.

    Returns:
        The data.
    """
    digits = load_digits()
    x, y = digits.images.astype(np.uint8)[..., None], digits.target
    train, test = split_test(y, "digits")
    return Arrays(x[train], y[train], x[test], y[test])


def read_torchvision(name: str, root: Path) -> Arrays:
    """One of torchvision's data sets, downloaded if it is not there.

    Args:
        name: one of `TORCHVISION`.
        root: folder where torchvision keeps data.

    Returns:
        The data.

    Raises:
        LabError: it is not there and cannot be downloaded.
    """
    from torchvision import datasets

    make: Callable[..., Any] = getattr(datasets, TORCHVISION[name].name)
    arrays: list[Array] = []
    for parts in (TORCHVISION[name].train, TORCHVISION[name].test):
        try:
            stacked = [stack(make(root, download=True, **part)) for part in parts]
        except (OSError, RuntimeError) as error:
            raise LabError(f"{name} is not in {root} and cannot be downloaded there: {error}") from None
        except Exception as error:  # torchvision's readers raise anything at bytes that are wrong
            raise LabError(f"{name} cannot be read from {root}: {error or type(error).__name__}") from None
        arrays += [np.concatenate(columns) for columns in zip(*stacked, strict=True)]
    if name == "omniglot":  # whose parts count their classes apart
        arrays[3] += arrays[1].max() + 1
    return Arrays(*arrays)


def _resized(size: int, image: Image.Image) -> Image.Image:
    return image.convert("L").resize((size, size))


class _Source(NamedTuple):
    """A data set of torchvision: its class, and options for the training and the test part."""

    name: str
    train: tuple[dict[str, Any], ...] = ({"train": True},)
    test: tuple[dict[str, Any], ...] = ({"train": False},)


_SVHN_TEST = ({"split": "test"},)
TORCHVISION = {
    "cifar10": _Source("CIFAR10"),
    "cifar100": _Source("CIFAR100"),
    "fashionmnist": _Source("FashionMNIST"),
    "kmnist": _Source("KMNIST"),
    "mnist": _Source("MNIST"),
    "omniglot": _Source(
        "Omniglot",
        ({"background": True, "transform": partial(_resized, 28)},),
        ({"background": False, "transform": partial(_resized, 28)},),
    ),
    "svhn": _Source("SVHN", ({"split": "train"},), _SVHN_TEST),
    "svhnextra": _Source("SVHN", ({"split": "train"}, {"split": "extra"}), _SVHN_TEST),
}


def stack(images: Any) -> tuple[Array, Array]:
    """A data set in the form of arrays.

    Args:
        images: sequence of pairs of a PIL image and a label; the images have one size.

    Returns:
        Images, (N, H, W, C), and labels, (N,).
    """
    pixels, labels = zip(*(images[index] for index in range(len(images))), strict=True)
    x = np.stack([np.asarray(image) for image in pixels])
    return (x if x.ndim == 4 else x[..., None]), np.array(labels)
