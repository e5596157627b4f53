"""Checkpoints in the middle of a run: whole or not there at all, and read without running code in them."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from renorm.markup import printable

from ..errors import LabError
from ..runs import Run
from ..store import file_stem, save_file, sole_writer

_KEPT = 2  # the last, and the one before in case the last is damaged


class Checkpoints:
    """The checkpoints of a run: files that torch.load reads, with the sum of their bytes in their name.

    Args:
        folder: output folder of the recipe.
        run: the run.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self._folder = folder / "checkpoints" / file_stem(run)

    def sole_writer(self) -> AbstractContextManager[None]:
        """A block in which no other process trains this run."""
        return sole_writer(self._folder, patience=60.0)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; the one before is kept, older ones are removed.

        Args:
            step: steps done.
            state: tensors, numbers, texts, lists, tuples and dicts of them.

        Raises:
            LabError: it cannot be written, as when the disk is full.
        """
        data = BytesIO()
        torch.save(_with_builtin_numbers(state), data)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{step:09d}-{_digest(data.getvalue())}.pt"
        save_file(path, lambda temporary: temporary.write_bytes(data.getbuffer()))
        for old in self._paths()[_KEPT:]:
            _remove(old)

    def load(self) -> dict[str, Any] | None:
        """Read the last checkpoint, or the one before if it is damaged, which is said and set aside.

        Returns:
            Its state, on the CPU; None if there is none.
        """
        for path in self._paths():
            data = path.read_bytes() if path.is_file() else b""
            try:
                if path.stem.endswith(_digest(data)):  # torch.load alone would not notice wrong bytes in a tensor
                    return dict(torch.load(BytesIO(data), map_location="cpu", weights_only=True))
            except MemoryError:
                raise
            except Exception:  # torch.load may raise anything at bytes that are no checkpoint
                pass
            self.set_aside()
        return None

    def set_aside(self) -> None:
        """Give the last checkpoint another name, so that the one before is the last, and say so."""
        path = self._paths()[0]
        print(f"renorm: warning: {printable(str(path))} is damaged; an earlier state is used", file=sys.stderr)
        aside = path.with_name(f"damaged-{path.name}")
        try:
            _remove(aside)
            path.replace(aside)
        except OSError as error:
            raise LabError(f"{path}: cannot be set aside: {error}") from None

    def remove(self) -> None:
        """Remove them all, once the run is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob("step-*.pt"), reverse=True)


def _remove(path: Path) -> None:
    if path.is_dir():  # which is not ours
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _with_builtin_numbers(value: Any) -> Any:
    """Without the types of numbers that check their range, which torch.load would have to import."""
    if isinstance(value, dict):
        return {key: _with_builtin_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_builtin_numbers(item) for item in value)
    plain = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return value if plain is None else plain(value)


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()


def random_states(device: torch.device) -> dict[str, Any]:
    """Where the generators of random numbers stand.

    Args:
        device: that is trained on.

    Returns:
        States of Python's, torch's and the GPU's generators.
    """
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators of random numbers where they stood.

    Args:
        states: as of `random_states`.
        device: that is trained on.
    """
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
