"""Result files: CSV, complete at every moment."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

Value = str | int | float
Row = dict[str, Value]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that nobody ever sees half of it.

    Args:
        path: the file; its folder is made.
        write: writes to the path that it is given, which is then renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    os.replace(temporary, path)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV file.

    Args:
        path: the file.
        rows: at least one; all have the same columns.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    replace_file(path, write)


def read_rows(path: Path) -> list[Row]:
    """Read a CSV file; what looks like a number is one.

    Args:
        path: the file.

    Returns:
        Its rows; none if there is no file.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def write_machine(path: Path, description: Row) -> None:
    """Write what a suite ran on, one property a line.

    Args:
        path: the file.
        description: value of each property.
    """
    write_rows(path, [{"property": name, "value": value} for name, value in description.items()])


def read_machine(path: Path) -> Row:
    """Read what a suite ran on.

    Args:
        path: the file.

    Returns:
        Value of each property; empty if there is no file.
    """
    return {str(row["property"]): row["value"] for row in read_rows(path)}


def _value(text: str) -> Value:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
