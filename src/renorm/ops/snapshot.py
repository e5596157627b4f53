"""Buffers as they are now, for compiled code that changes them later in the same step."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("renorm::snapshot", mutates_args=())
def _snapshot(tensor: Tensor) -> Tensor:
    return tensor.clone()


@_snapshot.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def snapshot(tensor: Tensor) -> Tensor:
    """A value that a compiled backward keeps instead of computing it again.

    The compiler may recompute r and d in the backward from the running statistics, which by then have moved
    (pytorch #197039); what comes out of an operation unknown to it is saved.

    Args:
        tensor: a buffer, any shape.

    Returns:
        A copy while compiling, else the tensor itself.
    """
    return _snapshot(tensor) if torch.compiler.is_compiling() else tensor
