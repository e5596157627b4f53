"""Launches that are bound: what Triton works out at a kernel's first launch is kept, and pointers are filled in."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..problem import CannotLaunch

class Launch:
    """A kernel with its grid and all that is no tensor.

    The first call goes through Triton, which compiles. Later ones call what it compiled, some 3 us instead of 20; their
    tensors must have the dtypes of the first, and lie on 16 bytes where those did.

    Args:
        kernel: with tensors first, then numbers, then constants.
        grid: programs along each axis.
        numbers: of the kernel, in order.
        constants: by name, and `num_warps`.
    """

    __slots__ = ("_bound", "_constants", "_grid", "_kernel", "_numbers")

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        self._bound: Any = None

    @property
    def is_bound(self) -> bool:
        """Whether places may be integers."""
        return self._bound is not None

    def first(self, _: None, *tensors: Tensor | None) -> None:
        """Launch through Triton, on the current stream, and keep what it found.

        Raises:
            CannotLaunch: Triton cannot compile it, or load it.
        """
        try:
            compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        except Exception as error:  # of Triton's compiler, its assembler, the C compiler that it calls, the driver
            raise CannotLaunch(f"{self._kernel.__name__}: {type(error).__name__}: {error}") from error
        self._bound = _bind(compiled, self._kernel, self._grid, len(tensors), self._numbers, self._constants)

    def __call__(self, stream: int, *places: int | None) -> None:
        """Launch again, on a stream."""
        run, grid, function, metadata, rest = self._bound
        run(*grid, stream, function, metadata, None, None, None, *places, *rest)


def _bind(
    compiled: Any, kernel: Any, grid: tuple[int, ...], tensors: int, numbers: tuple[Any, ...], constants: dict[str, Any]
) -> Any:
    """What a later launch needs; None where this Triton has it otherwise, or interprets."""
    try:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        names = kernel.arg_names[tensors + len(numbers) :]
        return run, (*grid, 1, 1)[:3], function, metadata, (*numbers, *(constants[name] for name in names))
    except (AttributeError, KeyError):
        return None


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as launches take it."""
    stream: int = triton.runtime.driver.active.get_current_stream(device.index or 0)
    return stream
