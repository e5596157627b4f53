"""Image folders: one sub-folder for each class."""

from __future__ import annotations

from pathlib import Path

from PIL import UnidentifiedImageError

from ..errors import LabError
from .arrays import Array, Arrays
from .readers import split_test, stack


def read_folder(path: Path, image_size: int) -> Arrays:
    """A tree of images: train/CLASS/IMAGE and test/CLASS/IMAGE (or val), or only CLASS/IMAGE, which is then split.

    Args:
        path: the folder.
        image_size: height and width in pixels to which images are resized and cropped.

    Returns:
        The data, in colour.

    Raises:
        LabError: a folder is missing, a class is empty, or an image cannot be read.
    """
    if not path.is_dir():
        raise LabError(f"{path}: there is no such folder")
    if not (path / "train").is_dir():
        x, y, _ = _read_tree(path, image_size)
        return split_test(x, y, str(path))
    test = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if test is None:
        raise LabError(f"{path}: has a train folder, but neither test nor val")
    x_train, y_train, classes = _read_tree(path / "train", image_size)
    x_test, y_test, test_classes = _read_tree(test, image_size)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise LabError(f"{path}: class {odd[0]} is not in both train and {test.name}")
    return Arrays(x_train, y_train, x_test, y_test)


def _read_tree(path: Path, image_size: int) -> tuple[Array, Array, list[str]]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    shape = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size)])
    try:
        images = ImageFolder(str(path), transform=shape)
        return *stack(images), images.classes
    except FileNotFoundError as error:  # no class folder, or an empty one
        raise LabError(f"{path}: {' '.join(str(error).split())}") from None
    except UnidentifiedImageError as error:
        raise LabError(f"{path}: {error}") from None
