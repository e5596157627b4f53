"""Modules that run a rewritten forward: their class is a subclass of the class they had."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast

from torch import nn

from .plan import Outcome, Plan, left, make_plan

_PLANS = "_fused_plans"
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_COPYING = ("__reduce__", "__reduce_ex__", "__getstate__")


class FusedForward(nn.Module):
    """A module that runs its rewritten forward where its plan holds, and otherwise its own.

    Copies and pickles are of the original class with its state; what they run is traced anew.
    """

    _original: ClassVar[type[nn.Module]]
    _fused_plans: tuple[Plan | None, Plan | None] = (None, None)  # at evaluation and in training

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in super().__getstate__().items() if name != _PLANS}
        return _new, (type(self)._original,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self)[_PLANS] = tuple(outcome.plan for outcome in _outcomes(self))


def install(module: nn.Module) -> tuple[Outcome, Outcome]:
    """Let a module run a rewritten forward, if anything can be fused in it.

    Args:
        module: module with norm layers; its class changes to a subclass.

    Returns:
        What became of it at evaluation and in training.
    """
    cls = type(module)
    if "forward" in vars(module):
        return _left(module, f"the forward of this {cls.__name__} is not its class's")
    if hasattr(cls, "__deepcopy__") or any(getattr(cls, name) is not getattr(nn.Module, name) for name in _COPYING):
        return _left(module, f"{cls.__name__} has its own way to be copied or pickled")
    outcomes = _outcomes(module)
    if any(outcome.plan for outcome in outcomes):
        module.__class__ = _fused_class(cls)
        vars(module)[_PLANS] = tuple(outcome.plan for outcome in outcomes)
    return outcomes


def uninstall(module: nn.Module) -> None:
    """Give a module back its class and its forward.

    Args:
        module: any module.
    """
    if "_original" in vars(type(module)):
        module.__class__ = cast(Any, type(module))._original
        vars(module).pop(_PLANS, None)


def _outcomes(module: nn.Module) -> tuple[Outcome, Outcome]:
    cls = getattr(type(module), "_original", type(module))
    return make_plan(module, cls, training=False), make_plan(module, cls, training=True)


def _left(module: nn.Module, reason: str) -> tuple[Outcome, Outcome]:
    return left(module, reason), left(module, reason)


def _new(original: type[nn.Module]) -> nn.Module:
    return object.__new__(_fused_class(original))


def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _CLASSES:
        _CLASSES[original] = _make_class(original)
    return _CLASSES[original]


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    own_forward = original.forward

    @functools.wraps(own_forward)
    def forward(self: FusedForward, *args: Any, **kwargs: Any) -> Any:
        plan = self._fused_plans[int(self.training)]
        if plan is None or kwargs or not plan.holds(self, args):
            return own_forward(self, *args, **kwargs)
        return plan.run(self, *args)

    namespace = {"_original": original, "forward": forward, "__module__": original.__module__}
    return type(f"Fused{original.__name__}", (FusedForward, original), namespace)
