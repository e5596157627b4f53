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
