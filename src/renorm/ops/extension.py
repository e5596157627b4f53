"""The C++ kernels, if they were built: loading them, and what they can take."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .plain import is_plain


def _load() -> bool:
    """Load the library, unless RENORM_CPU=off; other values of it hold the kernels to an older instruction set."""
    if os.environ.get("RENORM_CPU") == "off":
        return False
    for path in (Path(__file__).parent.parent).glob("_kernels.*"):
        try:
            torch.ops.load_library(path)
        except OSError as error:
            warnings.warn(
                "renorm runs without its C++ kernels, which do not load; `python -m renorm doctor` says what to do, "
                f"and RENORM_CPU=off goes without them: {error}",
                stacklevel=2,
            )
            return False
        return True
    return False


_loaded = _load()


def available() -> bool:
    """Whether the C++ kernels were built, and load.

    Returns:
        True if CPU tensors are normalized by them.
    """
    return _loaded


def suits(x: Tensor) -> bool:
    """Whether the kernels can take a tensor.

    Args:
        x: input of a normalization.

    Returns:
        True for a plain floating-point tensor on the CPU outside torch.func's transforms, if there are kernels.
    """
    return _loaded and x.is_cpu and is_plain(x)
