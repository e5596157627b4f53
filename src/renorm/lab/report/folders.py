"""Run folders as they lie on the disk, of this version or an older one."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from ..errors import LabError
from ..runs import CurvePoint, Result, Run
from ..store import Results

_SETTINGS = ("settings.json", "config.yaml", "provenance.json")  # the first is of renorm 0.1
_ACCURACIES = ("validation_accuracy_off", "validation_accuracy_on", "test_accuracy_off", "test_accuracy_on")

_Key = tuple[str, str, str]  # regime, method and seed
_T = TypeVar("_T", Run, Result, CurvePoint)


@dataclass(frozen=True)
class Folder:
    """What `renorm run` wrote.

    Args:
        path: where it lies.
        settings: options of the recipe, and where its results come from.
        command: the command line, if it is known.
        versions: of the programs, and whatever else results.csv says apart from runs and results.
        results: result of each finished run, in the order of the table.
    """

    path: Path
    settings: Mapping[str, object]
    command: str
    versions: Mapping[str, str]
    results: Results

    @property
    def name(self) -> str:
        """Its own name, without those above it."""
        return self.path.resolve().name

    @property
    def first(self) -> Run:
        """The run whose recipe, data and model are everybody's."""
        return next(iter(self.results))


def read_folder(path: Path) -> Folder:
    """Read a run folder.

    Args:
        path: the folder.

    Returns:
        Its content.

    Raises:
        LabError: there is no such folder, it is none of `renorm run`, or a file in it is damaged.
    """
    if not path.is_dir():
        raise LabError(f"{path}: there is no such folder")
    if not (path / "results.csv").is_file():
        raise LabError(f"{path}: holds no results.csv; folders are those that `renorm run` wrote")
    curves, measures = _curves(path / "curves.csv"), _measures(path / "measures.csv")
    rows = _rows(path / "results.csv")
    if not rows:
        raise LabError(f"{path}/results.csv: no run is finished")
    try:
        results = {_parse(Run, row): _result(row, curves, measures) for row in rows}
    except (KeyError, ValueError, TypeError) as error:
        raise LabError(f"{path}/results.csv: damaged, or of another version ({error!r})") from None
    if len({run.key for run in results}) < len(rows):
        raise LabError(f"{path}/results.csv: damaged: a run stands there twice")
    command = path / "command.txt"
    return Folder(path, _settings(path), command.read_text(encoding="utf-8").strip() if command.is_file() else "",
                  _versions(rows), results)  # fmt: skip


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise LabError(f"{path}: cannot be read: {error}") from None
    if any(None in row or None in row.values() for row in rows):
        raise LabError(f"{path}: damaged: its lines are not equally long")
    return rows


def _curves(path: Path) -> dict[_Key, list[CurvePoint]]:
    curves: dict[_Key, list[CurvePoint]] = {}
    try:
        for row in _rows(path) if path.is_file() else []:
            curves.setdefault(_key(row), []).append(_parse(CurvePoint, row))
    except (KeyError, ValueError, TypeError) as error:
        raise LabError(f"{path}: damaged, or of another version ({error!r})") from None
    return curves


def _measures(path: Path) -> dict[_Key, list[tuple[str, float]]]:
    measures: dict[_Key, list[tuple[str, float]]] = {}
    try:
        for row in _rows(path) if path.is_file() else []:
            measures.setdefault(_key(row), []).append((row["measure"], float(row["value"])))
    except (KeyError, ValueError) as error:
        raise LabError(f"{path}: damaged, or of another version ({error!r})") from None
    return measures


def _key(row: Mapping[str, str]) -> _Key:
    return row["regime"], row["method"], row["seed"]


def _result(
    row: Mapping[str, str],
    curves: Mapping[_Key, list[CurvePoint]],
    measures: Mapping[_Key, list[tuple[str, float]]],
) -> Result:
    for name in _ACCURACIES:
        if not 0 <= float(row[name]) <= 1:
            raise ValueError(f"{name} = {row[name]}")
    key = _key(row)
    return _parse(Result, row, curve=tuple(curves.get(key, ())), measures=tuple(measures.get(key, ())))


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
    return text if number is None else number(text)


def _settings(path: Path) -> dict[str, object]:
    settings: dict[str, object] = {}
    for file in (path / name for name in _SETTINGS):
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise LabError(f"{file}: damaged: {' '.join(str(error).split())}") from None
        if not isinstance(found, dict):
            raise LabError(f"{file}: damaged: it must hold options by name")
        settings |= found
    return settings


def _versions(rows: list[dict[str, str]]) -> dict[str, str]:
    known = {field.name for kind in (Run, Result) for field in fields(kind)}
    return {
        name: ", ".join(dict.fromkeys(row[name] for row in rows)) for name in rows[0] if name not in known
    }  # fmt: skip
