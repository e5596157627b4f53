"""Images that stay in their files until they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import LabError


class ImageFiles:
    """Images of a folder, decoded when they are taken.

    Args:
        paths: the files.
        size: height and width in pixels to which images are resized and cropped.
    """

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths = tuple(paths)
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, H and W, as of a tensor."""
        return len(self), 3, self.size, self.size

    def subset(self, indices: Sequence[int]) -> Self:
        """Some of the images.

        Args:
            indices: which.
        """
        return type(self)([self.paths[index] for index in indices], self.size)

    def image(self, index: int, augment: bool) -> Tensor:
        """An image.

        Args:
            index: which.
            augment: whether to cut out a random part and flip it at random, instead of the middle.

        Returns:
            (3, size, size), uint8.

        Raises:
            LabError: it cannot be read.
        """
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                cut: Tensor = _cut(self.size, augment)(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise LabError(f"{path}: {' '.join(str(error).split())}") from None
        return cut

    def take(self, indices: Sequence[int]) -> Tensor:
        """Images as a tensor.

        Args:
            indices: which.

        Returns:
            (N, 3, size, size), uint8.

        Raises:
            LabError: one cannot be read.
        """
        return torch.stack([self.image(index, augment=False) for index in indices])

    def check(self) -> None:
        """Open every file, as far as its header.

        Raises:
            LabError: one is no image.
        """
        for path in self.paths:
            try:
                Image.open(path).close()
            except (OSError, UnidentifiedImageError) as error:
                raise LabError(f"{path}: {' '.join(str(error).split())}") from None


def _cut(size: int, augment: bool) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    place = (
        [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()] if augment else [v2.Resize(size), v2.CenterCrop(size)]
    )
    cut: Callable[[Any], Tensor] = v2.Compose([*place, v2.PILToTensor()])
    return cut
