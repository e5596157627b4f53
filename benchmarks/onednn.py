"""oneDNN's batch normalization as a layer, with ReLU fused: what a library made for the processor takes.

Through oneDNN's C interface, since torch's own tensors for it know neither channels_last nor the fused ReLU. It comes
with `pip install onednn-cpu-gomp`; without it there is no such contender.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

_FILE = Path(sys.prefix, "lib", "libdnnl.so.3")
_CPU, _IN_ORDER, _FLOAT, _FORWARD, _BACKWARD = 1, 1, 3, 64, 128
_SCALE_AND_SHIFT, _FUSE_RELU, _WORKSPACE_OF = 2 | 4, 8, 135
_SRC, _DST, _MEAN, _VARIANCE, _SCALE, _SHIFT, _WORKSPACE = 1, 17, 49, 50, 51, 52, 64
_DIFF_SRC, _DIFF_DST, _DIFF_SCALE, _DIFF_SHIFT = 129, 145, 255, 256

Handle: TypeAlias = ctypes.c_void_p


class _Argument(ctypes.Structure):
    _fields_ = (("which", ctypes.c_int), ("memory", Handle))


def available() -> bool:
    """Whether the library is installed."""
    return _FILE.exists()


@cache
def _library() -> Any:
    library = ctypes.CDLL(str(_FILE))
    library.dnnl_primitive_desc_query_md.restype = Handle
    library.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
    return library


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), "dnnl_" + name)(*arguments)
    if status != 0:
        raise RuntimeError(f"oneDNN's {name} failed with status {status}")


def _made(name: str, *arguments: Any) -> Handle:
    handle = Handle()
    _call(name, ctypes.byref(handle), *arguments)
    return handle


@cache
def _engine() -> Handle:
    return _made("engine_create", _CPU, ctypes.c_size_t(0))


@cache
def _stream() -> Handle:
    return _made("stream_create", _engine(), _IN_ORDER)


class _Primitive:
    """A computation, with memory objects whose addresses are set at each call."""

    def __init__(self, description: Handle, memories: Mapping[int, Handle]) -> None:
        self.primitive = _made("primitive_create", description)
        self.memories = {which: _made("memory_create", of, _engine(), Handle()) for which, of in memories.items()}
        pairs = [_Argument(which, memory) for which, memory in self.memories.items()]
        self.arguments = (_Argument * len(pairs))(*pairs)

    def __call__(self, tensors: Mapping[int, Tensor]) -> None:
        for which, memory in self.memories.items():
            _call("memory_set_data_handle", memory, Handle(tensors[which].data_ptr()))
        _call("primitive_execute", self.primitive, _stream(), len(self.arguments), self.arguments)
        _call("stream_wait", _stream())


class _Plan:
    """Forward and backward for inputs like one of them."""

    def __init__(self, x: Tensor, relu: bool, eps: float) -> None:
        if x.dtype is not torch.float32:
            raise ValueError(f"oneDNN is measured with float32, got {x.dtype}")
        data = _memory_of(x.shape, x.stride())
        numbers = _memory_of((x.shape[1],), (1,))
        flags = ctypes.c_uint(_SCALE_AND_SHIFT | (_FUSE_RELU if relu else 0))
        name, options = "batch_normalization_{}_primitive_desc_create", (ctypes.c_float(eps), flags)
        forward = _made(name.format("forward"), _engine(), _FORWARD, data, data, *options, None)
        backward = _made(name.format("backward"), _engine(), _BACKWARD, data, data, data, *options, forward, None)
        common = {_SRC: data, _MEAN: numbers, _VARIANCE: numbers, _SCALE: numbers}
        self.workspace_bytes = 0
        if relu:
            common[_WORKSPACE] = Handle(_library().dnnl_primitive_desc_query_md(forward, _WORKSPACE_OF, 0))
            self.workspace_bytes = _library().dnnl_memory_desc_get_size(common[_WORKSPACE])
        self.forward = _Primitive(forward, {**common, _DST: data, _SHIFT: numbers})
        gradients = {_DIFF_DST: data, _DIFF_SRC: data, _DIFF_SCALE: numbers, _DIFF_SHIFT: numbers}
        self.backward = _Primitive(backward, common | gradients)


def _memory_of(sizes: tuple[int, ...], strides: tuple[int, ...]) -> Handle:
    dims = ctypes.c_int64 * 12  # the most that it knows
    return _made("memory_desc_create_with_strides", len(sizes), dims(*sizes), _FLOAT, dims(*strides))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, plan: _Plan) -> Tensor:
        y = torch.empty_like(x)
        mean, variance = torch.empty_like(weight), torch.empty_like(weight)
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8)
        kept = {_SRC: x, _MEAN: mean, _VARIANCE: variance, _SCALE: weight, _WORKSPACE: workspace}
        plan.forward({**kept, _DST: y, _SHIFT: bias})
        ctx.plan, ctx.kept = plan, kept
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        dx = torch.empty_like(ctx.kept[_SRC])
        dweight, dbias = torch.empty_like(ctx.kept[_SCALE]), torch.empty_like(ctx.kept[_SCALE])
        gradients = {_DIFF_DST: dy, _DIFF_SRC: dx, _DIFF_SCALE: dweight, _DIFF_SHIFT: dbias}
        ctx.plan.backward(ctx.kept | gradients)
        return dx, dweight, dbias, None


class OneDnnBatchNorm2d(nn.Module):
    """Batch normalization in training, without running statistics, which would only cost it more.

    Args:
        num_features: C, the number of channels.
        relu: whether ReLU follows, fused.
        eps: added to variances.
    """

    def __init__(self, num_features: int, relu: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.relu, self.eps = relu, eps
        self.plans: dict[tuple[Any, ...], _Plan] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a batch, (N, C, H, W), float32, in any dense layout."""
        key = x.shape, x.stride(), x.dtype
        if key not in self.plans:
            self.plans[key] = _Plan(x, self.relu, self.eps)
        y: Tensor = _Function.apply(x, self.weight, self.bias, self.plans[key])
        return y
