"""From what --data says to a data set."""

from __future__ import annotations

from pathlib import Path

from ..errors import LabError
from .arrays import Arrays, check_arrays
from .dataset import Dataset, make_dataset
from .folder import read_folder
from .readers import TORCHVISION, read_digits, read_npz, read_torchvision


def load_dataset(source: str, root: Path, image_size: int) -> Dataset:
    """Read, check and split a data set.

    Args:
        source: "digits", the name of a torchvision data set, an .npz file or an image folder.
        root: folder of torchvision's data sets.
        image_size: height and width in pixels of images from a folder.

    Returns:
        The data set.

    Raises:
        LabError: it is not there, or something is wrong with it; the message names the file.
    """
    arrays = _read(source, root, image_size)
    check_arrays(arrays, source)
    return make_dataset(arrays, source)


def _read(source: str, root: Path, image_size: int) -> Arrays:
    name = source.lower().replace("-", "").replace("_", "")
    if name == "digits":
        return read_digits()
    if name in TORCHVISION:
        return read_torchvision(name, root)
    if source.endswith(".npz"):
        return read_npz(Path(source))
    if Path(source).is_dir():
        return read_folder(Path(source), image_size)
    names = ", ".join(("digits", *TORCHVISION))
    raise LabError(f"{source}: there is no such file or folder, and it is not the name of a data set ({names})")
