"""Images that stay in their files until they are needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..errors import LabError

_NAMED = 20  # files that cannot be read, as many as a screen shows; the others are counted
# Of the formats that PIL finds by looking into files: others call programs, as that of EPS, or are rarely read.
_FORMATS = "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"
_MOST_PIXELS = 2**26  # of an image whose short side is resized

_Read = TypeVar("_Read")


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

    def subset(self, indices: Sequence[int]) -> ImageFiles:
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
        with _opened(self.paths[index], self.size) as image:
            cut: Tensor = _cut(self.size, augment)(image.convert("RGB"))
        return cut

    def take(self, indices: Sequence[int]) -> Tensor:
        """Images as a tensor.

        Args:
            indices: which.

        Returns:
            (N, 3, size, size), uint8.

        Raises:
            LabError: some cannot be read; it names them.
        """
        return torch.stack(_all(lambda index: self.image(index, augment=False), indices))

    def check(self) -> None:
        """Open every file, as far as its header.

        Raises:
            LabError: some are no images; it names them.
        """
        _all(self._open, range(len(self)))

    def _open(self, index: int) -> None:
        with _opened(self.paths[index], self.size):
            pass


@contextmanager
def _opened(path: Path, size: int) -> Iterator[Image.Image]:
    """An image, of which no more than the header is read before it is known to fit into memory, also where resized."""
    if path.exists() and not path.is_file():
        raise LabError(f"{path}: is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                short, long = sorted(image.size)
                if size * size * long // short > _MOST_PIXELS:
                    raise LabError(f"{path}: is too long for its width: {image.width} x {image.height} pixels")
                yield image
    except LabError:
        raise
    except Exception as error:  # PIL's readers raise anything at bytes that are wrong
        raise LabError(f"{path}: {error or type(error).__name__}") from None


def _all(read: Callable[[int], _Read], indices: Sequence[int]) -> list[_Read]:
    """What is read at all indices, or one error that tells of every file that cannot be."""
    found, wrong = [], []
    for index in indices:
        try:
            found.append(read(index))
        except LabError as error:
            wrong.append(str(error))
    if len(wrong) == 1:
        raise LabError(wrong[0])
    if wrong:
        more = [f"and {len(wrong) - _NAMED} more"] if len(wrong) > _NAMED else []
        raise LabError(f"{len(wrong)} images cannot be read:", [*wrong[:_NAMED], *more])
    return found


def _cut(size: int, augment: bool) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    place = (
        [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()] if augment else [v2.Resize(size), v2.CenterCrop(size)]
    )
    cut: Callable[[Any], Tensor] = v2.Compose([*place, v2.PILToTensor()])
    return cut
