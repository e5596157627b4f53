"""The output folder: finished runs as CSV files, complete at every moment, so that an interrupted job continues."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

import renorm

from .errors import LabError
from .runs import CurvePoint, Result, Run

Results = dict[Run, Result]

_KEY = ("regime", "method", "seed")
_RESULT_COLUMNS = tuple(field.name for field in fields(Result) if field.name != "curve")
_CURVE_COLUMNS = tuple(field.name for field in fields(CurvePoint))
_INDIFFERENT = ("out", "workers")  # options that do not change results


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that nobody ever sees half of it.

    Args:
        path: the file.
        write: writes to the path that it is given, which is then renamed.
    """
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    os.replace(temporary, path)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that nobody ever sees half of it.

    Args:
        path: the file.
        text: its content.
    """
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def open_folder(folder: Path, options: Mapping[str, object], command: str) -> None:
    """Create the output folder, or make sure that it was made by the same recipe with the same options.

    Args:
        folder: the folder.
        options: recipe and options by name.
        command: the command line, kept in command.txt.

    Raises:
        LabError: the folder cannot be used, or belongs to other options.
    """
    settings = folder / "settings.json"
    relevant = {name: _plain(value) for name, value in options.items() if name not in _INDIFFERENT}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if settings.exists():
            _check_same(json.loads(settings.read_text(encoding="utf-8")), relevant, folder)
        replace_text(settings, json.dumps(relevant, indent=2) + "\n")
        replace_text(folder / "command.txt", command + "\n")
    except (OSError, json.JSONDecodeError) as error:
        raise LabError(f"{folder}: cannot be used for results: {error}") from None


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _check_same(before: Mapping[str, object], now: Mapping[str, object], folder: Path) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise LabError(
                f"{folder}: holds results with {name} = {before.get(name)}, not {now.get(name)}; "
                f"choose another --out, or delete the folder"
            )


def write_results(folder: Path, results: Results) -> None:
    """Write results.csv, one row for each run, and curves.csv, one row for each point.

    Args:
        folder: the output folder.
        results: result of each finished run, in the order to write them.
    """
    versions = {"renorm": renorm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    points = [_key_row(run) | asdict(point) for run, result in results.items() for point in result.curve]
    rows = [asdict(run) | {name: getattr(result, name) for name in _RESULT_COLUMNS} | versions
            for run, result in results.items()]  # fmt: skip
    # The curves come first: a run counts as finished once it stands in results.csv.
    _write_csv(folder / "curves.csv", [*_KEY, *_CURVE_COLUMNS], points)
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
        results = {}
        for row in _read_csv(path):
            key = tuple(row[name] for name in _KEY)
            numbers = {name: float(row[name]) for name in _RESULT_COLUMNS}
            results[by_key[key]] = Result(**numbers, curve=tuple(curves[key]))
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
