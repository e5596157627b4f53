"""The Triton kernels, if Triton is there: what they can take. They themselves are imported at the first call."""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor

from .plain import is_plain

# Known from the start, since torch.compile cannot look for it.
_available = os.environ.get("RENORM_GPU") != "off" and find_spec("triton") is not None


def suits(x: Tensor) -> bool:
    """Whether the kernels can take a tensor.

    Args:
        x: input of a normalization.

    Returns:
        True for a plain floating-point tensor on a GPU outside torch.func's transforms, if there is Triton and
        RENORM_GPU is not off.
    """
    return _available and x.is_cuda and is_plain(x)
