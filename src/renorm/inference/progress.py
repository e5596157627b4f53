"""A progress bar, where rich is installed and somebody is watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


@contextmanager
def progress(description: str, total: float, shown: bool) -> Iterator[Callable[[float], None]]:
    """Show a bar on standard error while a block runs.

    Args:
        description: beside the bar.
        total: amount of work, in any unit; as it is known at the start.
        shown: False for no bar.

    Yields:
        A function to be told how much of the work is done.
    """
    bar = _bar() if shown else None
    if bar is None:
        yield lambda done: None
        return
    task = bar.add_task(description, total=total)
    with bar:
        yield lambda done: bar.update(task, completed=done)


def _bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    console = Console(stderr=True)
    watched = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    return Progress(console=console, transient=True) if watched else None
