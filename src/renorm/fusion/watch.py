"""What a forward does that torch.fx traces without noticing, so that the trace is not what the forward does."""

from __future__ import annotations

import gc
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Questions whose answer is another while tracing than while running, or may be another later on.
_QUESTIONS = {
    "isinstance", "issubclass", "type", "hasattr", "is_tensor",
    "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled",
    "random",
}  # fmt: skip


def _code(function: Callable[..., Any]) -> CodeType:
    code: CodeType = inspect.unwrap(function).__code__
    return code


# What surrounds calls, and leaves nothing in a graph.
_SURROUNDINGS: dict[CodeType, str] = {
    _code(torch.autocast.__enter__): "autocast",
    _code(torch.no_grad.__enter__): "no_grad",
    _code(torch.enable_grad.__enter__): "enable_grad",
    _code(torch.set_grad_enabled.__init__): "set_grad_enabled",
    _code(torch.inference_mode.__enter__): "inference_mode",
    _code(torch.autograd.graph.saved_tensors_hooks.__enter__): "saved_tensors_hooks",
    _code(checkpoint): "checkpoint",
}
_TRUSTED = sys.stdlib_module_names | {"torch"}


@contextmanager
def watched(traced: nn.Module) -> Iterator[list[str]]:
    """Watch the code that runs inside, and leave the random numbers as they were.

    Args:
        traced: the module whose code it is.

    Yields:
        A list that fills with the names of what a trace does not show.
    """
    unseen: list[str] = []

    def look(frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        if frame.f_code in _SURROUNDINGS:
            unseen.append(_SURROUNDINGS[frame.f_code])
        elif _is_models(frame):
            questions = _QUESTIONS.intersection(frame.f_code.co_names)
            unseen.extend(sorted(questions) if questions and not _is_import(frame) else ())
            if _is_about_another(frame, traced):
                unseen.append("code about another module")

    profiler, python_state, torch_state = sys.getprofile(), random.getstate(), torch.get_rng_state()
    collects = gc.isenabled()
    gc.disable()  # or finalizers of whatever was left elsewhere would run here, and be taken for the model's code
    sys.setprofile(look)
    try:
        yield unseen
    finally:
        sys.setprofile(profiler)
        if collects:
            gc.enable()
        # as lists, since comparing tensors is an operation, which fake tensors would not allow
        if random.getstate() != python_state or torch.get_rng_state().tolist() != torch_state.tolist():
            unseen.append("random numbers")
            random.setstate(python_state)
            torch.set_rng_state(torch_state)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_models(frame: FrameType) -> bool:
    """Whether a frame runs code of the model, not of Python, torch or this package's own tracing."""
    module = _module(frame)
    return not module.startswith(__package__) and module.partition(".")[0] not in _TRUSTED


def _is_about_another(frame: FrameType, traced: nn.Module) -> bool:
    """Whether a frame is in a method of another module, whose settings nobody notes, or in a function of one."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return isinstance(first, nn.Module) and first is not traced


def _is_import(frame: FrameType) -> bool:
    """Whether a frame belongs to an import, which torch does here and there when something is used first."""
    caller: FrameType | None = frame
    while caller is not None and not _module(caller).startswith(__package__):
        if _module(caller).startswith(("importlib", "_frozen_importlib")):
            return True
        caller = caller.f_back
    return False
