"""From what --data says to a data set."""

from __future__ import annotations

from pathlib import Path

from ..errors import LabError
from .arrays import Arrays, check_arrays
from .dataset import Dataset, array_parts
from .folder import read_folder
from .named import NAMED
from .npz import read_npz
from .readers import TORCHVISION, read_digits, read_torchvision
from .shrink import shrunk
from .split import split_validation


def load_dataset(source: str, root: Path, image_size: int) -> Dataset:
    """Read, check and split a data set.

    Args:
        source: "digits", the name of a data set, an .npz file or an image folder.
        root: folder of torchvision's data sets.
        image_size: height and width in pixels of images from a folder, and to which larger ones are shrunk that are
            kept as arrays.

    Returns:
        The data set.

    Raises:
        LabError: it is not there, or something is wrong with it; the message names the file.
    """
    name = dataset_name(source)
    if name in NAMED:
        return NAMED[name](root, image_size)
    arrays = read_arrays(source, root)
    if arrays is None:
        return read_folder(Path(source), image_size)
    check_arrays(arrays, source)
    return split_validation(*array_parts(shrunk(arrays, image_size)), source)


def read_arrays(source: str, root: Path) -> Arrays | None:
    """Read a data set that is kept as arrays.

    Args:
        source: see `load_dataset`.
        root: folder of torchvision's data sets.

    Returns:
        Images and labels, unchecked; None if the source is a folder of images.

    Raises:
        LabError: it is not there, or cannot be read.
    """
    name = dataset_name(source)
    if name == "digits":
        return read_digits()
    if name in TORCHVISION:
        return read_torchvision(name, root)
    if source.endswith(".npz"):
        return read_npz(Path(source))
    if name in NAMED or Path(source).is_dir():
        return None
    names = ", ".join(("digits", *TORCHVISION, *NAMED))
    raise LabError(f"{source}: there is no such file or folder, and it is not the name of a data set ({names})")


def dataset_name(source: str) -> str:
    """The name of a data set, however it is written.

    Args:
        source: see `load_dataset`.

    Returns:
        Lower case, without hyphens and underscores.
    """
    return source.lower().replace("-", "").replace("_", "")
