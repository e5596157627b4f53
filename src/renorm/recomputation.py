"""Telling a checkpoint's recomputation from a forward, and giving it the statistics that the forward saw.

torch.utils.checkpoint runs a region twice: in the forward, and again inside the backward pass. What belongs together
is known to the object that lives as long as the region's part of the graph: the context of the reentrant variant's
autograd.Function, or the non-reentrant one's frame. So a layer leaves there what it normalized by, and finds it there
again.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch._C import _autograd

T = TypeVar("T")
_ATTRIBUTE = "_renorm_recording"
_top_hooks: Any = _autograd._top_saved_tensors_default_hooks  # None where there are none, which its stub denies


class Recording(Generic[T]):
    """What the calls inside a region saw, by layer and in order; told again in every recomputation."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, list[T]] = {}
        self._told: dict[Hashable, tuple[Hashable, int]] = {}

    def add(self, layer: Hashable, seen: T) -> None:
        """Note what a call of a layer saw."""
        self._seen.setdefault(layer, []).append(seen)

    def next(self, layer: Hashable, recomputation: Hashable) -> T | None:
        """What the same call saw in the forward.

        Args:
            layer: which is called.
            recomputation: tells one from another, since a graph that is retained may have several.

        Returns:
            What was noted; None if the forward had no such call.
        """
        current, index = self._told.get(layer, (None, 0))
        if current != recomputation:
            index = 0
        self._told[layer] = (recomputation, index + 1)
        seen = self._seen.get(layer, [])
        return seen[index] if index < len(seen) else None


def suspected() -> bool:
    """Whether a forward may be part of a checkpoint, by what costs nothing to ask.

    Returns:
        False in an ordinary training forward.
    """
    return _top_hooks(True) is not None or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1


def regions() -> list[Recording[Any]]:
    """The checkpoints, one inside the other, of which this is the first forward.

    Returns:
        Their recordings; none outside of checkpoints.
    """
    owners = list(_frames_of_hooks())
    if not torch.is_grad_enabled():
        owners += [context for frame in _stack() if (context := _context(frame, "forward")) is not None]
    return [_recording(owner) for owner in owners]


def recomputed() -> tuple[Recording[Any], Hashable] | None:
    """The checkpoint that is recomputed now.

    Returns:
        Its recording and a name for this recomputation; None outside of torch.utils.checkpoint's.
    """
    if not is_backward() and _top_hooks(True) is None:
        return None
    for frame in _stack():
        owner = _context(frame, "backward") or _frame_of_unpacking(frame)
        if owner is not None:
            return _recording(owner), torch._C._current_graph_task_id()
    return None


def is_backward() -> bool:
    """Whether this runs inside a backward pass, as only recomputations do.

    Returns:
        True on the threads of a backward pass; False while compiling, which knows of none.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _recording(owner: Any) -> Recording[Any]:
    if not hasattr(owner, _ATTRIBUTE):
        setattr(owner, _ATTRIBUTE, Recording())
    recording: Recording[Any] = getattr(owner, _ATTRIBUTE)
    return recording


def _frames_of_hooks() -> Iterator[Any]:
    # torch shows the innermost pair of hooks only.
    hooks = []
    while (pair := _top_hooks(True)) is not None:
        hooks.append(pair)
        _autograd._pop_saved_tensors_default_hooks()
    for pair in reversed(hooks):
        _autograd._push_saved_tensors_default_hooks(*pair)
    for pack, _ in hooks:
        if _is_checkpoint(pack):
            yield from (cell.cell_contents for cell in pack.__closure__)


def _is_checkpoint(pack: Any) -> bool:
    code = getattr(pack, "__code__", None)
    return code is not None and pack.__qualname__.startswith("_checkpoint_hook.") and code.co_freevars == ("frame",)


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame := frame.f_back if frame else None:
        yield frame


def _context(frame: FrameType, method: str) -> Any:
    """The context of an autograd.Function's method, torch's reentrant checkpoint or another's."""
    code = frame.f_code
    # not a module's method; to read the variables of a frame costs, and keeps them
    if code.co_name != method or not code.co_argcount or code.co_varnames[0] == "self":
        return None
    first: Any = frame.f_locals.get(code.co_varnames[0])
    return first if isinstance(first, torch.autograd.function.BackwardCFunction) else None


def _frame_of_unpacking(frame: FrameType) -> Any:
    code = frame.f_code
    if code.co_name != "unpack_hook" or "frame" not in code.co_freevars:
        return None
    owner = frame.f_locals["frame"]
    return owner if type(owner).__name__ == "_CheckpointFrame" else None
