"""A layer's step in eager mode by the C++ kernels, past torch's dispatcher, which costs more than small layers do.

A kind of step is all that follows from shape, strides, dtype and options; `dispatch.train` keeps them.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..limits import Limits
from ..moments import accumulation_dtype
from ..transforms import unwatched
from .backends import library_files
from .problem import Given, Inputs, RunningState, Settings, require_unchanged
from .schema import Coefficients
from .tracking import Rule

_ADDRESS, _NUMBER, _SIZE = ctypes.c_void_p, ctypes.c_double, ctypes.c_int64
_NAME = _PACKED = ctypes.c_char_p
# ForwardArguments and BackwardArguments in csrc/step.cpp
_pack_forward, _pack_backward = struct.Struct("9P2d2P").pack, struct.Struct("11P").pack


def _functions() -> tuple[Any, ...]:
    library = ctypes.CDLL(str(library_files()[0]))
    signatures = {
        "renorm_make_step": (
            (_NAME, *[_SIZE] * 3, ctypes.c_bool, _SIZE, _SIZE, _NAME, _NAME, _NUMBER, _NUMBER),
            _ADDRESS,
        ),
        "renorm_drop_step": ((_ADDRESS,), None),
        "renorm_step_forward": ((_ADDRESS, _PACKED), ctypes.c_bool),
        "renorm_step_backward": ((_ADDRESS, _PACKED), ctypes.c_bool),
    }
    functions = []
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
        functions.append(function)
    return tuple(functions)


_make_step, _drop_step, _step, _step_backward = _functions()


def _refuse() -> NoReturn:
    raise MemoryError("the C++ kernels had no memory for a layer's step")


class Kind:
    """What a step of tensors of a kind needs, apart from their addresses, and where it keeps what for the backward."""

    def __init__(self, inputs: Inputs, settings: Settings, rule: Rule) -> None:
        self.address: int | None = None
        x, weight, bias, mask, residual = inputs
        examples, channels, *positions = x.shape
        grouping, eps, act = settings
        is_last = x.movedim(1, -1).is_contiguous()  # of (N, C) both layouts are the same, and columns the better view
        is_dense = is_last or x.is_contiguous()
        self.strides = (x if is_dense else torch.empty_like(x, memory_format=torch.contiguous_format)).stride()
        self.wide = accumulation_dtype(x.dtype)
        self.takes_as_they_are = (  # but for the sign of x and residual, which the kind does not know
            is_dense
            and mask is None
            and (residual is None or residual.stride() == self.strides)
            and self._vector(weight) is weight
            and self._vector(bias) is bias
        )
        self.groups, self.channels = sum(number for number, _ in grouping.parts(examples)), channels
        # made like these, which takes less time than from sizes
        with unwatched():
            size = (2 + len(Coefficients._fields)) * self.groups * channels + self.groups
            self.kept = torch.empty(size, dtype=self.wide, device="cpu")
            self.kept_bytes = self.kept.nbytes
            self.parameter = torch.empty(channels, dtype=self.wide, device="cpu")
        self.address = _make_step(
            str(x.dtype).removeprefix("torch.").encode(),
            examples,
            channels,
            math.prod(positions),
            is_last,
            grouping.examples_per_group or examples,
            grouping.channels_per_group,
            (act or "none").encode(),
            rule.tracking.encode(),
            -1.0 if rule.momentum is None else rule.momentum,
            eps,
        )
        if not self.address:
            _refuse()

    def __del__(self) -> None:
        if _drop_step is not None:  # at the interpreter's end
            _drop_step(self.address)

    def step(
        self, inputs: Given, settings: Settings, state: RunningState, limits: Limits | None
    ) -> tuple[Tensor, Tensor, Kind]:
        """The output, the buffer of what is kept, and itself as the plan; the running statistics move, in place."""
        x, weight, bias, mask, residual = inputs
        mean, var, steps, skipped = state
        if not self.takes_as_they_are or x.is_neg() or (residual is not None and residual.is_neg()):
            x, residual = self._dense(x), None if residual is None else self._dense(residual)
            weight, bias = self._vector(weight), self._vector(bias)
            mask = None if mask is None else mask.contiguous()
        r_max, d_max = (0.0, 0.0) if limits is None else limits.at(int(steps))
        y, kept = torch.empty_like(x), torch.empty_like(self.kept)
        packed = _pack_forward(
            x.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            mean.data_ptr(), var.data_ptr(), steps.data_ptr(), skipped.data_ptr(), r_max, d_max,
            y.data_ptr(), kept.data_ptr(),
        )  # fmt: skip
        if not _step(self.address, packed):
            _refuse()
        return y, kept, self

    def backward(
        self, dy: Tensor, saved: Sequence[Tensor | None], plan: Kind, settings: Settings, wants_residual: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of x, weight, bias and residual, from x, weight, mask, residual, y and what was kept."""
        x, weight, mask, residual, y, kept = saved
        assert x is not None
        assert kept is not None
        require_unchanged(dy, saved, self.kept_bytes)
        # Hooks may give back what was saved in another layout; where they do not, two calls are spared.
        if x.stride() != self.strides or x.is_neg() or dy.stride() != self.strides or dy.is_neg():
            x, dy = self._dense(x), self._dense(dy)
        weight = self._vector(weight)
        if residual is not None:
            residual = self._dense(residual)
        if y is not None:
            y = self._dense(y)
        if mask is not None:
            mask = mask.contiguous()
        dx, dresidual = torch.empty_like(x), torch.empty_like(x) if wants_residual else None
        dweight, dbias = torch.empty_like(self.parameter), torch.empty_like(self.parameter)
        packed = _pack_backward(
            dy.data_ptr(), x.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            0 if y is None else y.data_ptr(),
            kept.data_ptr(), dx.data_ptr(),
            0 if dresidual is None else dresidual.data_ptr(),
            dweight.data_ptr(), dbias.data_ptr(),
        )  # fmt: skip
        if not _step_backward(self.address, packed):
            _refuse()
        return dx, dweight, dbias, dresidual

    def count(self, kept: Tensor) -> Tensor:
        """Elements of each group, (G, 1)."""
        begin = 2 * self.groups * self.channels
        return kept[begin : begin + self.groups].view(self.groups, 1)

    def coefficients(self, kept: Tensor) -> Tensor:
        """See `schema.Coefficients`, (6, G, C)."""
        return kept[2 * self.groups * self.channels + self.groups :].view(-1, self.groups, self.channels)

    def _dense(self, tensor: Tensor) -> Tensor:
        """A tensor of x's shape in the layout that the plan is for, its memory being what it says."""
        if tensor.stride() == self.strides and not tensor.is_neg():
            return tensor
        return tensor.new_empty_strided(tensor.shape, self.strides).copy_(tensor)

    def _vector(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or (tensor.dtype is self.wide and tensor.is_contiguous() and not tensor.is_neg()):
            return tensor
        return tensor.to(self.wide).contiguous().resolve_neg()


def kind_of_step(inputs: Inputs, settings: Settings, rule: Rule) -> Kind:
    """The kind of a step, see `kernels.Kind`."""
    return Kind(inputs, settings, rule)
