"""The terminal, where names of files are text and never markup."""

from __future__ import annotations

import io
import sys

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """What prints texts and tables as they are.

    Args:
        stderr: print to standard error instead of the output.

    Returns:
        The console.
    """
    return Console(stderr=stderr, markup=False, emoji=False)


def write_any_letter() -> None:
    """Let output be escaped that the terminal's encoding does not have, or that was no text, as bytes in names."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
