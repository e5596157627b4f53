"""Finished runs as CSV files, complete at every moment, of this version or an older one."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from renorm.files import guard_cell, unguard_cell

from .errors import LabError
from .runs import CurvePoint, Result, Run
from .store import save_file

Results = dict[Run, Result]

_RUN_COLUMNS = tuple(field.name for field in fields(Run))
_RESULT_COLUMNS = tuple(field.name for field in fields(Result) if field.name not in ("curve", "measures", "versions"))
_KEY = ("regime", "method", "seed")
_MEASURE_COLUMNS = ("measure", "value")
_CURVE_COLUMNS = tuple(field.name for field in fields(CurvePoint))
_LARGEST = 2**63 - 1  # of whole numbers, as wherever they go to
_ACCURACIES = ("validation_accuracy_off", "validation_accuracy_on", "test_accuracy_off", "test_accuracy_on")

_Key = tuple[str, ...]
_T = TypeVar("_T", Run, Result, CurvePoint)
_Row = TypeVar("_Row")


def write_results(folder: Path, results: Results) -> None:
    """Write results.csv, one row for each run, curves.csv, one for each point, and measures.csv, one for each measure.

    Args:
        folder: the output folder.
        results: result of each finished run, in the order to write them.
    """
    points = [_key_row(run) | asdict(point) for run, result in results.items() for point in result.curve]
    measures = [
        _key_row(run) | dict(zip(_MEASURE_COLUMNS, pair, strict=True))
        for run, result in results.items()
        for pair in result.measures
    ]
    rows = [
        asdict(run) | {name: getattr(result, name) for name in _RESULT_COLUMNS} | dict(result.versions)
        for run, result in results.items()
    ]
    programs = dict.fromkeys(name for result in results.values() for name, _ in result.versions)
    # The others come first: a run counts as finished once it stands in results.csv.
    _write_csv(folder / "curves.csv", [*_KEY, *_CURVE_COLUMNS], points)
    if measures:
        _write_csv(folder / "measures.csv", [*_KEY, *_MEASURE_COLUMNS], measures)
    _write_csv(folder / "results.csv", [*_RUN_COLUMNS, *_RESULT_COLUMNS, *programs], rows)


def read_finished(folder: Path, runs: Sequence[Run]) -> Results:
    """Results of those runs of a recipe that are finished.

    Args:
        folder: the output folder, perhaps empty.
        runs: all runs of the recipe.

    Returns:
        Results by run.

    Raises:
        LabError: a file is damaged, or holds a run that is none of `runs`.
    """
    path = folder / "results.csv"
    if not path.exists():
        return {}
    if not path.is_file():
        raise LabError(f"{path}: is no file")
    by_key = {run.key: run for run in runs}
    found = read_results(folder)
    other = next((run for run in found if run.key not in by_key), None)
    if other is not None:
        raise LabError(f"{path}: damaged, or of another version (it holds {other}); delete it to start anew")
    return {by_key[run.key]: result for run, result in found.items()}


def read_results(folder: Path) -> Results:
    """All results in a folder.

    Args:
        folder: that holds results.csv, and perhaps curves.csv and measures.csv.

    Returns:
        Result of each finished run, in the order of the table.

    Raises:
        LabError: a file is damaged.
    """
    curves = _by_run(folder / "curves.csv", _point)
    measures = _by_run(folder / "measures.csv", lambda row: (row["measure"], float(row["value"])))
    path = folder / "results.csv"
    rows = _read_csv(path)
    try:
        results = {_parse(Run, row): _result(row, curves, measures) for row in rows}
    except (KeyError, ValueError, TypeError) as error:
        raise LabError(f"{path}: damaged, or of another version ({error!r})") from None
    if len({run.key for run in results}) < len(rows):
        raise LabError(f"{path}: damaged: a run stands there twice")
    return results


def _by_run(path: Path, parse: Callable[[dict[str, str]], _Row]) -> dict[_Key, list[_Row]]:
    """The rows of each run; none if there is no such file."""
    found: dict[_Key, list[_Row]] = {}
    try:
        for row in _read_csv(path) if path.is_file() else []:
            found.setdefault(_key(row), []).append(parse(row))
    except (KeyError, ValueError, TypeError) as error:
        raise LabError(f"{path}: damaged, or of another version ({error!r})") from None
    return found


def _result(
    row: Mapping[str, str],
    curves: Mapping[_Key, list[CurvePoint]],
    measures: Mapping[_Key, list[tuple[str, float]]],
) -> Result:
    for name in _ACCURACIES:
        _require_share(name, float(row[name]))
    key = _key(row)
    versions = tuple((name, text) for name, text in row.items() if text and name not in _RUN_COLUMNS + _RESULT_COLUMNS)
    return _parse(Result, row, curve=tuple(curves.get(key, ())), measures=tuple(measures.get(key, ())),
                  versions=versions)  # fmt: skip


def _point(row: Mapping[str, str]) -> CurvePoint:
    point = _parse(CurvePoint, row)
    _require_share("validation_accuracy", point.validation_accuracy)
    return point


def _require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value}")


def _parse(kind: type[_T], row: Mapping[str, str], **known: Any) -> _T:
    """A dataclass from a row; a field that is younger than the row has its default, or None."""
    hints = get_type_hints(kind)
    values = dict(known)
    for field in fields(kind):
        if field.name in values or (field.name not in row and field.default is not MISSING):
            continue
        optional = NoneType in get_args(hints[field.name])
        text = row.get(field.name, "") if optional else row[field.name]
        values[field.name] = None if optional and not text else _value(text, hints[field.name])
    return kind(**values)


def _value(text: str, hint: Any) -> object:
    kinds = get_args(hint) or (hint,)
    if bool in kinds:
        return {"True": True, "False": False}[text]
    number = next((kind for kind in (int, float) if kind in kinds), None)
    if number is None:
        return text
    value = number(text)
    if number is int and abs(value) > _LARGEST:
        raise ValueError(text[:20])
    return value


def _key(row: Mapping[str, str]) -> _Key:
    return tuple(row[name] for name in _KEY)


def _key_row(run: Run) -> dict[str, str]:
    return {name: str(getattr(run, name)) for name in _KEY}


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        # names of files may hold bytes that are no UTF-8
        with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for row in rows:
                writer.writerow({name: guard_cell(v) if isinstance(v, str) else v for name, v in row.items()})

    save_file(path, write)


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise LabError(f"{path}: cannot be read: {error}") from None
    if any(None in row or None in row.values() for row in rows):
        raise LabError(f"{path}: damaged: its lines are not equally long")
    return [{name: unguard_cell(text) for name, text in row.items()} for row in rows]
