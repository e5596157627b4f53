"""What can compute: which kernels there are, and which tensors each one takes."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..moments import Moments, accumulation_dtype
from ..transforms import is_transformed, is_transformed_eagerly
from . import aten, reference
from .problem import Implementation, Inputs, LaunchError, RunningState, Settings
from .schema import implement

_PLAIN = (Tensor, nn.Parameter)  # subclasses bring operations of their own
_MOST_ELEMENTS = 2**31  # of an example, whose columns the Triton kernels count in 32 bits
_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def _load_cpu_kernels() -> bool:
    """Load the C++ library, unless RENORM_CPU=off; other values of it hold it to an older instruction set."""
    if os.environ.get("RENORM_CPU") == "off" or not has_stable_abi():
        return False
    for path in library_files():
        try:
            torch.ops.load_library(path)
            if not hasattr(ctypes.CDLL(str(path)), "renorm_step_forward"):
                raise OSError("they were built from another version of renorm")
        except OSError as error:
            warnings.warn(
                "renorm runs without its C++ kernels, which do not load; `python -m renorm doctor` says what to do, "
                f"and RENORM_CPU=off goes without them: {error}",
                stacklevel=2,
            )
            return False
        return True
    return False


def has_stable_abi() -> bool:
    """Whether this torch has what the C++ kernels are built for, its stable ABI as of 2.10."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 10)


def _wants_triton() -> bool:
    """Whether RENORM_GPU=triton asks for the Triton kernels, and it is there; torch.compile cannot look for it later.

    Until a device has run them, torch's own kernels are the default.
    """
    return os.environ.get("RENORM_GPU") == "triton" and find_spec("triton") is not None


def library_files() -> list[Path]:
    """Where the C++ kernels were built.

    Returns:
        One file, or none.
    """
    return sorted(Path(__file__).parents[1].glob("_kernels.*"))


def instruction_set() -> str:
    """What the C++ kernels compute with: "avx512", "avx2" or "baseline"."""
    name: str = torch.ops.renorm.instruction_set()
    return name


class Kernels(NamedTuple):
    """Kernels of ours for a kind of device: implementations of the operations in `schema`.

    Args:
        are_there: whether they can be called, asked once.
        module: where they are, if they are in Python; see `schema.implement`.
        steps: module with `kind_of_step`, for a layer's training step past torch's dispatcher; None if there is none.
    """

    are_there: Callable[[], bool]
    module: str | None = None
    steps: str | None = None


_TRITON = "renorm.ops.triton.launch"
# By torch's name for the kind of device.
KERNELS = {
    "cpu": Kernels(_load_cpu_kernels, steps="renorm.ops.native"),
    "cuda": Kernels(_wants_triton, _TRITON, _TRITON),
}
available = {device: kernels.are_there() for device, kernels in KERNELS.items()}
for _device, _kernels in KERNELS.items():
    if _kernels.module is not None:
        implement(_device, _kernels.module)


def give_up(device: str, error: LaunchError) -> None:
    """Go on without the kernels of a kind of device, which do not run here.

    Args:
        device: torch's name for the kind of device.
        error: why.

    Warns:
        UserWarning: what is computed with from now on.
    """
    if available[device]:
        available[device] = False
        warnings.warn(
            f"renorm goes by torch's own kernels from now on, since its own do not run here: {error}", stacklevel=4
        )


def take(x: Tensor) -> bool:
    """Whether kernels of ours take a batch: C++ on the CPU, Triton on a GPU.

    Args:
        x: input, (N, C, *S).

    Returns:
        True for plain floating-point tensors, on a device with kernels, whose operations nobody has to see.
    """
    if not available.get(x.device.type, False) or x.dtype not in _DTYPES:
        return False
    if x.is_cuda and x.numel() >= _MOST_ELEMENTS * len(x):
        return False
    return (torch.compiler.is_compiling() or type(x) in _PLAIN) and not is_transformed()


def module_of_steps(inputs: Inputs, state: RunningState) -> Any:
    """Which kernels make a layer's training step in one call past torch's dispatcher.

    Args:
        inputs: the batch, of which x is not watched.
        state: buffers to move in place.

    Returns:
        Their module for plain tensors on one device, whose contiguous buffers are in x's accumulation dtype; else None.
        What is compiled needs the statistics as an output, to move them where it can order the writes.
    """
    x, *others = inputs
    if x.numel() == 0 or not take(x):
        return None
    if inputs.residual is not None and inputs.residual.dtype != x.dtype:  # to be cast under autograd's eyes
        return None
    for tensor in others:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.device != x.device):
            return None
    if state.mean.dtype != accumulation_dtype(x.dtype) or not _can_move(x, state):
        return None
    path = KERNELS[x.device.type].steps
    return None if path is None else import_module(path)


def is_watched(x: Tensor) -> bool:
    """Whether a call past torch's dispatcher would be missed.

    Args:
        x: one of its tensors.

    Returns:
        True for tensors that are not plain, while compiling, in torch.func's transforms, and in a mode that sees every
        operation.
    """
    if torch.compiler.is_compiling():
        return True
    return type(x) not in _PLAIN or torch._C._len_torch_dispatch_stack() > 0 or is_transformed_eagerly()


def take_moments(moments: Moments, state: RunningState) -> bool:
    """Whether they move buffers by given moments.

    Args:
        moments: of a batch.
        state: buffers to move in place.

    Returns:
        True in eager mode, for plain contiguous buffers of the moments' dtype on their device.
    """
    if torch.compiler.is_compiling() or not take(moments.mean):
        return False
    return moments.mean.dtype == state.mean.dtype and _can_move(moments.mean, state)


def is_batch_norm(inputs: Inputs, settings: Settings) -> bool:
    """Whether an evaluation without an example weight is torch's own batch norm, which does it as fast.

    Args:
        inputs: the batch.
        settings: channels_per_group and activation.

    Returns:
        True without mask, residual, activation and channel groups.
    """
    if inputs.mask is not None or inputs.residual is not None:
        return False
    return settings.act is None and settings.grouping.channels_per_group == 1


def take_evaluation(inputs: Inputs) -> bool:
    """Whether they evaluate a batch that is more than batch norm.

    Args:
        inputs: the batch.

    Returns:
        True in eager mode without gradients.
    """
    x, weight, bias, _, residual = inputs
    if torch.compiler.is_compiling() or torch.jit._trace.is_tracing():  # what is exported must run where we are not
        return False
    if x.numel() == 0 or not take(x):
        return False
    needs_gradient = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, residual))
    return not (needs_gradient and torch.is_grad_enabled())


def _can_move(x: Tensor, state: RunningState) -> bool:
    """Whether buffers are plain, contiguous tensors on the device of x, of the dtypes that a layer makes them in."""
    mean, var, steps, skipped = state
    if var.dtype != mean.dtype or not steps.dtype == skipped.dtype == torch.int64:
        return False  # `.data` was set, or functional_call has others: an average's steps are no integer
    device = x.device
    for tensor in state:  # a loop, which takes half as long as all(...)
        if type(tensor) not in _PLAIN or tensor.device != device or not tensor.is_contiguous() or tensor.is_neg():
            return False
    return steps.numel() == skipped.numel() == 1


def of_torch(inputs: Inputs, settings: Settings) -> Implementation:
    """Who computes what kernels of ours do not take.

    Args:
        inputs: x not empty.
        settings: grouping above all.

    Returns:
        Torch's own kernels for a per-channel group of the whole batch in eager mode, else the definition.
    """
    x = inputs.x
    if torch.compiler.is_compiling() or inputs.mask is not None or not settings.grouping.is_plain(x.shape[0]):
        return reference.DEFINITION
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and _is_laid_out_plainly(x):
        return aten.CPU
    if x.is_cuda and x.dtype in _DTYPES:
        return aten.GPU
    return reference.DEFINITION


def _is_laid_out_plainly(x: Tensor) -> bool:
    # torch's kernels err on other strides, even where those of a dimension of size 1 are all that differs
    positions = range(x.ndim - 1, 1, -1)
    return x.stride() in (_dense_strides(x, (*positions, 1, 0)), _dense_strides(x, (1, *positions, 0)))


def _dense_strides(x: Tensor, dims_from_innermost: Iterable[int]) -> tuple[int, ...]:
    strides, step = [0] * x.ndim, 1
    for dim in dims_from_innermost:
        strides[dim] = step
        step *= x.shape[dim]
    return tuple(strides)
