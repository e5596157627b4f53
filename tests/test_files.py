"""Files that are written as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from renorm.files import replace_file, save_csv


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
