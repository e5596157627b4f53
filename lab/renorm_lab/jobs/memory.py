"""Memory that a finished run leaves behind."""

from __future__ import annotations

import ctypes
import sys


def return_memory() -> None:
    """Give free memory back to the system, where that is glibc's to do.

    It keeps the large blocks that a training has freed, between small ones that stay: up to a gigabyte a run.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not musl's
        if trim is not None:
            trim(0)
