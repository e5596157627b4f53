"""`.npz` files, which are looked through before anything is allocated for them."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path

import numpy as np

from ..errors import LabError
from .arrays import Array, Arrays

_MOST_OF_ONE = 1_032  # bytes that DEFLATE makes of one at most
_METHODS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # numpy's own


def read_npz(path: Path) -> Arrays:
    """An .npz file with x_train, y_train, x_test and y_test.

    Args:
        path: the file.

    Returns:
        The data, unchecked.

    Raises:
        LabError: there is no such file, it cannot be read, lacks an array, or holds other ones than its size allows.
    """
    if not path.exists():
        raise LabError(f"{path}: there is no such file")
    if not path.is_file():
        raise LabError(f"{path}: is no file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [_name(archive, name, path) for name in Arrays._fields]
            sizes = [_size(archive, name, path) for name in names]
            if sum(sizes) > _memory():
                raise LabError(f"{path}: does not fit into memory: its arrays have {sum(sizes):,} bytes")
            return Arrays(*(_array(archive, name) for name in names))
    except LabError:
        raise
    except Exception as error:  # the readers of zip files and of arrays raise anything at bytes that are wrong
        raise LabError(f"{path}: cannot be read as .npz: {error or type(error).__name__}") from None


def _name(archive: zipfile.ZipFile, name: str, path: Path) -> str:
    if f"{name}.npy" not in archive.namelist():
        raise LabError(f"{path}: {name} is not in the file (it must hold {', '.join(Arrays._fields)})")
    return f"{name}.npy"


def _size(archive: zipfile.ZipFile, name: str, path: Path) -> int:
    """Bytes of an array by its header, of which there are as many in the file."""
    entry = archive.getinfo(name)
    if entry.flag_bits & 1:
        raise LabError(f"{path}: {name} is encrypted")
    if entry.compress_type not in _METHODS:
        raise LabError(f"{path}: {name} is compressed in another way than numpy's savez_compressed does")
    if entry.compress_size > path.stat().st_size or entry.file_size > _MOST_OF_ONE * entry.compress_size:
        raise LabError(f"{path}: {name} cannot be as large as the file says, {entry.file_size:,} bytes")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        size, held = math.prod(shape) * dtype.itemsize, entry.file_size - file.tell()
    if dtype.hasobject:
        raise LabError(f"{path}: {name} holds Python objects, not numbers")
    if size != held or min(shape, default=0) < 0:
        raise LabError(f"{path}: {name} of shape {shape} would have {size:,} bytes, but holds {held:,}")
    return size


def _array(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _memory() -> float:
    """Bytes of this machine's memory, where that can be known."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf
