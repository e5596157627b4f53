"""Fusing norm layers of a model with what follows them, by subclasses with a rewritten forward."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar, cast, get_args

from torch import nn

from ..activation import Activation
from .norm_act import NormAct
from .plan import LISTS, Outcome, Plan, layers_of, left, make_plan
from .roles import is_bare
from .sites import Fused, NotFused

Row = TypeVar("Row", Fused, NotFused)
Rows = tuple[tuple[Fused, ...], tuple[NotFused, ...]]
_PLANS = "_fused_plans"
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_COPYING = ("__reduce__", "__reduce_ex__", "__getstate__")


def fuse(model: nn.Module, callers: Container[nn.Module] | None = None) -> Rows:
    """Let norm layers of ours apply the activation, and add the residual, that follow them, in place.

    Layers, parameters and state dict stay as they are. What changes is the forward of the modules that call the
    layers, as far as torch.fx proves that it computes the same.

    Args:
        model: model with norm layers of ours.
        callers: modules to fuse calls in, and timm's layers to fuse inside of; None for all. What was fused elsewhere
            is undone.

    Returns:
        The calls that are fused, and those that are not, with names and reasons.
    """
    unfuse(model)
    fused: list[Fused] = []
    not_fused: list[NotFused] = []
    for name, module in model.named_modules():
        if callers is not None and module not in callers:
            continue
        if isinstance(module, NormAct) and not is_bare(module):
            rows = _fuse_inside(name, module)
        elif layers_of(module) and type(module) not in LISTS:
            rows = _fuse_calls(name, module)
        else:
            continue
        fused += rows[0]
        not_fused += rows[1]
    return tuple(fused), tuple(not_fused)


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`, in place.

    Args:
        model: any model.
    """
    for module in model.modules():
        uninstall(module)
        if isinstance(module, NormAct):
            module.fused = False


def _fuse_inside(name: str, layer: NormAct) -> Rows:
    """Let timm's layer apply its activation with the normalization."""
    act = layer.fusable_activation()
    if act is None:
        kinds = f"{type(layer.drop).__name__} and {type(layer.get_submodule('act')).__name__}"
        reason = f"its {kinds} are not Identity and one of {', '.join(get_args(Activation))}"
        return (), (NotFused(name, reason),)
    layer.fused = True
    return (Fused(name, False, act),), ()


def _fuse_calls(name: str, owner: nn.Module) -> Rows:
    """Let a module call its layers with what follows them."""
    evaluation, training = install(owner)
    return (
        tuple(_rows(name, evaluation.fused, training.fused)),
        tuple(_rows(name, evaluation.not_fused, training.not_fused)),
    )


def _rows(owner: str, evaluation: Sequence[Row], training: Sequence[Row]) -> Iterator[Row]:
    """Rows of both modes; a row of one mode says so."""
    for row in training:
        yield replace(row, name=_join(owner, row.name), note="" if row in evaluation else "in training only")
    for row in evaluation:
        if row not in training:
            yield replace(row, name=_join(owner, row.name), note="at evaluation only")


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


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
