"""Fusing norm layers of a model with what follows them, and undoing it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar, get_args

from torch import nn

from ..activation import Activation
from .forward import install, uninstall
from .norm_act import NormAct
from .plan import LISTS, layers_of
from .roles import is_bare
from .sites import Fused, NotFused

Row = TypeVar("Row", Fused, NotFused)
Rows = tuple[tuple[Fused, ...], tuple[NotFused, ...]]


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
