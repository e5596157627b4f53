"""Ctrl-C and SIGTERM, as batch systems and containers send it, heard where the program can stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_NUMBERS = signal.SIGINT, signal.SIGTERM


@contextmanager
def hearing_interrupts() -> Iterator[Callable[[], None]]:
    """A block in which SIGINT and SIGTERM wait until the program asks for them; for the main thread.

    An exception that a signal's handler raises is lost in a destructor or a callback, becomes another error in C++ that
    calls Python, and may leave a lock of the standard library behind.

    Yields:
        What raises KeyboardInterrupt if a signal has come, as the end of the block does. A second signal does not wait.
    """
    heard = False

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if heard:
            raise KeyboardInterrupt
        heard = True

    def stop_if_heard() -> None:
        if heard:
            raise KeyboardInterrupt

    with ExitStack() as stack:
        for number in _NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of what a script starts in the background
                stack.callback(signal.signal, number, signal.signal(number, hear))
        yield stop_if_heard
    stop_if_heard()


@contextmanager
def deferring_interrupts() -> Iterator[None]:
    """A block during which SIGINT waits, and whose child processes never get it; those of Windows do."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
