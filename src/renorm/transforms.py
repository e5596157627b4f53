"""Who looks at operations from outside: the compiler, tracing, torch.func's transforms, forward-mode AD, modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes


def is_transformed() -> bool:
    """Whether somebody has to see every operation by itself, through no autograd.Function and no kernel of ours.

    Returns:
        True in torch.func's transforms, compiled ones too; in forward-mode AD, torch.jit.trace and torch.export.
    """
    if torch.compiler.is_compiling():
        # by its type, since to the compiler what it gets from C++ is never None
        running = torch._C._functorch.peek_interpreter_stack()
        return torch.compiler.is_exporting() or isinstance(running, torch._C._functorch.CInterpreter)
    return is_transformed_eagerly()


def is_transformed_eagerly() -> bool:
    """The same, where nothing is being compiled."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def is_left_over(tensor: Tensor) -> bool:
    """Whether a tensor comes from a transform of torch.func that has ended, after which nothing can compute with it.

    Args:
        tensor: any.

    Returns:
        True for vmap's batches, and for what grad and others wrapped.
    """
    if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    level, running = torch._C._functorch.maybe_get_level(tensor), torch._C._functorch.peek_interpreter_stack()
    return level < 0 or level > (0 if running is None else running.level())


@contextmanager
def unwatched() -> Iterator[None]:
    """Make plain tensors, which outlast what surrounds the call: inference mode, fake tensors, the caller's modes.

    Yields:
        Nothing.
    """
    with torch.inference_mode(False), _disable_current_modes():
        yield


@torch.library.custom_op("renorm::snapshot", mutates_args=())
def _snapshot(tensor: Tensor) -> Tensor:
    return tensor.clone()


@_snapshot.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


@_snapshot.register_vmap
def _(info: Any, in_dims: tuple[int | None], tensor: Tensor) -> tuple[Tensor, int | None]:
    found: Tensor = _snapshot(tensor)
    return found, in_dims[0]


def snapshot(tensor: Tensor) -> Tensor:
    """A value that a compiled backward keeps instead of computing it again.

    The compiler may recompute r and d in the backward from the running statistics, which by then have moved
    (pytorch #197039); what comes out of an operation unknown to it is saved.

    Args:
        tensor: a buffer, any shape.

    Returns:
        A copy while compiling, but for export, whose graphs have torch's operations only; else the tensor itself.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        found: Tensor = _snapshot(tensor)
        return found
    return tensor
