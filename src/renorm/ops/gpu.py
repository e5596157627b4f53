"""The Triton kernels, if Triton is there: what they can take. They themselves are imported at the first call."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from .types import takes_kernels


@cache
def available() -> bool:
    """Whether there is Triton to compile the kernels with, and RENORM_GPU is not off.

    Returns:
        True if GPU tensors are normalized by the kernels.
    """
    return os.environ.get("RENORM_GPU") != "off" and find_spec("triton") is not None


def suits(x: Tensor) -> bool:
    """Whether the kernels can take a tensor.

    Args:
        x: input of a normalization.

    Returns:
        True for a plain floating-point tensor on a GPU outside torch.func's transforms, if there is Triton.
    """
    return x.is_cuda and available() and takes_kernels(x)
