"""The output folder: finished runs as CSV files, complete at every moment, so that an interrupted job continues."""

from __future__ import annotations

import csv
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import renorm

from .errors import LabError
from .runs import CurvePoint, Result, Run

Results = dict[Run, Result]

_KEY = ("regime", "method", "seed")
_RESULT_COLUMNS = tuple(field.name for field in fields(Result) if field.name not in ("curve", "measures"))
_MEASURE_COLUMNS = ("measure", "value")
_CURVE_COLUMNS = tuple(field.name for field in fields(CurvePoint))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that nobody ever sees half of it, even if the machine loses power.

    Args:
        path: the file.
        write: writes to the path that it is given, which is then renamed.

    Raises:
        LabError: it cannot be written, as when the disk is full.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)  # half a file would only fill the disk
            raise
        os.replace(temporary, path)
    except OSError as error:
        raise LabError(f"{path}: cannot be written: {error.strerror or error}") from None


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that nobody ever sees half of it.

    Args:
        path: the file.
        text: its content.
    """
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


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
    replace_file(path, lambda temporary: torch.save(model.state_dict(), temporary))


def write_results(folder: Path, results: Results) -> None:
    """Write results.csv, one row for each run, curves.csv, one for each point, and measures.csv, one for each measure.

    Args:
        folder: the output folder.
        results: result of each finished run, in the order to write them.
    """
    versions = {"renorm": renorm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    points = [_key_row(run) | asdict(point) for run, result in results.items() for point in result.curve]
    rows = [asdict(run) | {name: getattr(result, name) for name in _RESULT_COLUMNS} | versions
            for run, result in results.items()]  # fmt: skip
    measures = [
        _key_row(run) | dict(zip(_MEASURE_COLUMNS, pair, strict=True))
        for run, result in results.items()
        for pair in result.measures
    ]
    # The others come first: a run counts as finished once it stands in results.csv.
    _write_csv(folder / "curves.csv", [*_KEY, *_CURVE_COLUMNS], points)
    if measures:
        _write_csv(folder / "measures.csv", [*_KEY, *_MEASURE_COLUMNS], measures)
    _write_csv(folder / "results.csv", list(rows[0]), rows)


def read_results(folder: Path, runs: Sequence[Run]) -> Results:
    """Results of the runs that are finished.

    Args:
        folder: the output folder, perhaps empty.
        runs: all runs of the recipe.

    Returns:
        Results by run.

    Raises:
        LabError: a file is damaged, or holds a run that is none of `runs`.
    """
    by_key = {tuple(_key_row(run).values()): run for run in runs}
    path = folder / "results.csv"
    try:
        curves: dict[tuple[str, ...], list[CurvePoint]] = {}
        for row in _read_csv(folder / "curves.csv"):
            point = CurvePoint(int(row["step"]), float(row["train_loss"]), float(row["validation_accuracy"]))
            curves.setdefault(tuple(row[name] for name in _KEY), []).append(point)
        measures: dict[tuple[str, ...], list[tuple[str, float]]] = {}
        for row in _read_csv(folder / "measures.csv"):
            pair = row["measure"], float(row["value"])
            measures.setdefault(tuple(row[name] for name in _KEY), []).append(pair)
        results = {}
        for row in _read_csv(path):
            key = tuple(row[name] for name in _KEY)
            numbers = {name: float(row[name]) for name in _RESULT_COLUMNS}
            results[by_key[key]] = Result(**numbers, curve=tuple(curves[key]), measures=tuple(measures.get(key, ())))
    except (KeyError, ValueError, TypeError) as error:
        raise LabError(f"{path}: damaged, or of another version ({error!r}); delete it to start anew") from None
    return results


def _key_row(run: Run) -> dict[str, str]:
    return {name: str(getattr(run, name)) for name in _KEY}


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    replace_file(path, write)


def _read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
