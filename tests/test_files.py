"""Files that are written as a whole or not at all."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from renorm.files import guard_cell, replace_file, save_csv, unguard_cell


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    save_csv(file, ["a", "b"], [(1, 0.123456789), ("x", None)])
    assert file.read_text() == "a,b\n1,0.123457\nx,\n"

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        replace_file(file, fail)
    assert file.read_text() == "a,b\n1,0.123457\nx,\n"
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    for file in (tmp_path / "absent" / "table.csv", tmp_path / "file" / "table.csv", tmp_path / "folder"):
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(OSError, match=f"'{file}'$") as raised:
            save_csv(file, ["a"], [(1,)])
        assert raised.value.filename == str(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_error_of_another_file_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        replace_file(tmp_path / "copy", lambda path: path.write_bytes((tmp_path / "source").read_bytes()))
    assert raised.value.filename == str(tmp_path / "source")


@pytest.mark.parametrize("path", [".", "/"])
def test_a_folder_is_no_file(path: str) -> None:
    with pytest.raises(IsADirectoryError, match=path):
        replace_file(path, Path.touch)


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "@SUM(1)", "+1+1", "-1-1", "\t=1", "'=1", "''", "'-", "'it",
                                  "-", "", "-0.5", "batch norm"])  # fmt: skip
def test_no_cell_is_a_formula_and_each_comes_back(tmp_path: Path, text: str) -> None:
    save_csv(tmp_path / "table.csv", ["a"], [[text]])
    with (tmp_path / "table.csv").open(newline="") as file:
        cell = list(csv.reader(file))[1:]
    cell = cell[0][0] if cell and cell[0] else ""
    assert cell == guard_cell(text)
    assert unguard_cell(cell) == text
    assert cell[:1] not in ("=", "@", "+", "\t")
    assert cell[:1] != "-" or text in ("-", "-0.5")


def test_names_that_are_no_text_are_written_with_escapes(tmp_path: Path) -> None:
    save_csv(tmp_path / "table.csv", ["a"], [["\udce9.npz"]])
    assert (tmp_path / "table.csv").read_text() == "a\n\\udce9.npz\n"
