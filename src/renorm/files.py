"""Files that are there as a whole or not at all."""

from __future__ import annotations

import csv
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write a file so that nobody ever sees half of it, even if the machine loses power.

    Args:
        path: file to write, in a folder that exists; an older one is replaced once the new one is complete.
        write: writes to the path that it is given, `.NAME.part` in the same folder, which is then renamed.

    Raises:
        OSError: it cannot be written, as when the disk is full; the error names `path`. An older file stays as it was.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     replace_file(f"{folder}/note.txt", lambda path: path.write_text("whole"))
        ...     Path(folder, "note.txt").read_text()
        'whole'
    """
    path = Path(path)
    if not path.name:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()  # half a file would only fill the disk
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


_FORMULA = "=+-@\t\r"  # what a spreadsheet takes for the beginning of one
_MARK = "'"  # what it takes for the beginning of text


def guard_cell(cell: str) -> str:
    """Text as the cell of a table, which a spreadsheet shows and never computes.

    Args:
        cell: any text.

    Returns:
        The same, behind an apostrophe where it could be taken for a formula; numbers stay as they are.

    Source:
        OWASP, "CSV injection".

    Example:
        >>> guard_cell("batch norm"), guard_cell("-0.5"), guard_cell("=1+1"), unguard_cell("'=1+1")
        ('batch norm', '-0.5', "'=1+1", '=1+1')
    """
    formula = cell[:1] in _FORMULA and len(cell) > 1 and not _is_number(cell)
    return _MARK + cell if formula or _is_guarded(cell) else cell


def unguard_cell(cell: str) -> str:
    """The text that `guard_cell` has made a cell of.

    Args:
        cell: as it stands in the file.

    Returns:
        The text.
    """
    return cell[1:] if _is_guarded(cell) else cell


def _is_guarded(cell: str) -> bool:
    return cell[:1] == _MARK and len(cell) > 1 and cell[1] in _FORMULA + _MARK


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def save_csv(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table, as a whole or not at all.

    Args:
        path: file to write; an older one is replaced.
        header: names of the columns.
        rows: cells; floats get six significant digits, and texts go by `guard_cell`.

    Raises:
        OSError: it cannot be written; the error names `path`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_csv(f"{folder}/runs.csv", ["seed", "accuracy"], [(0, 0.93211234), (1, 0.9274)])
        ...     Path(folder, "runs.csv").read_text().splitlines()
        ['seed,accuracy', '0,0.932112', '1,0.9274']
    """

    def write(temporary: Path) -> None:
        # names of files may hold bytes that are no UTF-8
        with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(map(guard_cell, header))
            writer.writerows(map(_cell, row) for row in rows)

    replace_file(path, write)


def _cell(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return guard_cell(value) if isinstance(value, str) else value
