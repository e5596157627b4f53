"""Which tensors kernels can take, whatever the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)  # subclasses bring operations of their own
_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def is_plain(x: Tensor) -> bool:
    """Whether kernels can take a tensor, if there are any for its device.

    Args:
        x: input of a normalization.

    Returns:
        True for a plain floating-point tensor outside torch.func's transforms.
    """
    if x.dtype not in _DTYPES:
        return False
    if torch.compiler.is_compiling():
        return True
    return type(x) in _PLAIN and torch._C._functorch.peek_interpreter_stack() is None


def suits_state(x: Tensor, state: Iterable[Tensor]) -> bool:
    """Whether the kernels that take x can move buffers in place.

    Args:
        x: a tensor that there are kernels for.
        state: running statistics and counters.

    Returns:
        True for plain, contiguous tensors on the device of x.
    """
    return all(type(tensor) in _PLAIN and tensor.device == x.device and tensor.is_contiguous() for tensor in state)
