"""Files of the output folder, there as a whole or not at all."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from renorm.files import replace_file

from .errors import LabError
from .runs import Run


def save_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file by `renorm.files.replace_file`.

    Args:
        path: the file.
        write: writes to the path that it is given, which is then renamed.

    Raises:
        LabError: it cannot be written, as when the disk is full.
    """
    try:
        replace_file(path, write)
    except OSError as error:
        raise LabError(f"{path}: cannot be written: {error.strerror or error}") from None


def save_text(path: Path, text: str) -> None:
    """Write a text file.

    Args:
        path: the file.
        text: its content.
    """
    save_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


@contextmanager
def sole_writer(folder: Path, patience: float = 10.0) -> Iterator[None]:
    """A block that one process at a time is in, for the same folder; it ends with the process, too, however that ends.

    Args:
        folder: made if it is not there. Not every file system of a network keeps processes apart.
        patience: seconds to wait for another process, which may have been killed a moment ago.

    Raises:
        LabError: the folder cannot be used, or the other process is still there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"{folder}: cannot be used for results: {error}") from None
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + patience
        while not _locked(descriptor):
            if time.monotonic() > end:
                raise LabError(f"{folder}: another process is writing to it: let it end, or choose another folder")
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Whether a lock could be had, or there are none to be had here."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def file_stem(run: Run) -> str:
    """The name of a run in file names.

    Args:
        run: the run.

    Returns:
        REGIME-METHOD-SEED, with hyphens for everything that a file name had better not hold.
    """
    return re.sub(r"[^\w.+=]+", "-", "-".join(map(str, run.key)))


def save_weights(folder: Path, run: Run, model: nn.Module) -> None:
    """Keep a trained network, as weights/REGIME-METHOD-SEED.pt.

    Args:
        folder: the output folder.
        run: the run.
        model: its network, whose state dict is kept.
    """
    path = folder / "weights" / f"{file_stem(run)}.pt"
    path.parent.mkdir(exist_ok=True)
    save_file(path, lambda temporary: torch.save(model.state_dict(), temporary))


def read_settings(path: Path) -> dict[str, Any]:
    """What a file says by name.

    Args:
        path: a JSON or YAML file.

    Returns:
        Values by name; none if there is no such file.

    Raises:
        LabError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
        str(found)  # as everything here may be shown
    except RecursionError:
        raise LabError(f"{path}: damaged: it is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LabError(f"{path}: damaged: {error}") from None
    if not (isinstance(found, dict) and all(isinstance(name, str) for name in found)):
        raise LabError(f"{path}: damaged: it must hold options by name")
    return found


class _Loader(yaml.SafeLoader):
    """Without references to what stands elsewhere, of which a few lines would make more than the memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it refers to another place in itself")
        return super().compose_node(parent, index)
