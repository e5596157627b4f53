"""Parameter groups: which gammas and betas are decayed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import nn

from ..fusion.tracing import UntraceableError
from .paths import exposed_norms, is_norm
from .toward import TOWARD, require_attachment

Which = Literal["auto", "all", "none"]


def param_groups(
    model: nn.Module, weight_decay: float, norm: Which = "auto", toward: Literal[0, 1] = 0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, that say which gammas and betas are decayed.

    Decaying gamma and beta regularizes where a path leads from their norm layer to the model's output through no
    other norm layer, which would undo it, as in residual networks; elsewhere it hurts. Everything but gamma and beta
    is decayed, as by an optimizer without groups.

    Norm layers are those of renorm and of torch.nn (batch, instance, group, layer and RMS norm), with subclasses.
    Parameters that are frozen now are in no group; shared ones are in one.

    Args:
        model: any model; traced in training mode, on a copy of its structure, which takes no data.
        weight_decay: of all that is decayed, at least 0.
        norm: which norm layers' gamma and beta are decayed: "auto", those with such a path; "all"; or "none", the
            field's custom. Where torch.fx cannot trace the model "auto" is "none", with a warning.
        toward: what gamma decays toward, 0 or 1; beta decays toward 0. For 1, hand the optimizer to
            `decay_toward_one`, or its first step is an error.

    Returns:
        Up to four groups, those that are not empty, with the names "not norm", "gamma", "beta" and "norm, not
        decayed".

    Raises:
        ValueError: an option is not one of the above.

    Warns:
        UserWarning: the model cannot be traced, and why.

    Source:
        Summers & Dinneen 2020, section 3.3.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
        >>> groups = param_groups(model, weight_decay=1e-4)
        >>> [(group["name"], len(group["params"]), group["weight_decay"]) for group in groups]
        [('not norm', 4, 0.0001), ('gamma', 1, 0.0001), ('beta', 1, 0.0001), ('norm, not decayed', 2, 0.0)]
        >>> groups[1]["params"][0] is model[3].weight
        True
        >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    """
    _check(weight_decay, norm, toward)
    norms = {module for module in model.modules() if is_norm(module)}
    gammas = _ids(layer._parameters.get("weight") for layer in norms)
    all_of_norms = _ids(parameter for layer in norms for parameter in layer._parameters.values())
    chosen = _chosen(model, norms, norm)
    decayed = _ids(parameter for layer in chosen for parameter in layer._parameters.values())
    names = ("not norm", "gamma", "beta", "norm, not decayed")
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "weight_decay": float(weight_decay)} for name in names
    }
    groups["norm, not decayed"]["weight_decay"] = 0.0
    if toward == 1:
        require_attachment()
        groups["gamma"][TOWARD] = 1
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        name = "not norm"
        if id(parameter) in all_of_norms:
            name = "norm, not decayed"
        if id(parameter) in decayed:
            name = "gamma" if id(parameter) in gammas else "beta"
        groups[name]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _check(weight_decay: float, norm: str, toward: int) -> None:
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be at least 0 and finite, got {weight_decay}")
    if norm not in get_args(Which):
        raise ValueError(f"norm must be 'auto', 'all' or 'none', got {norm!r}")
    if toward not in (0, 1):
        raise ValueError(f"toward must be 0 or 1, got {toward!r}")


def _ids(parameters: Iterable[nn.Parameter | None]) -> set[int]:
    return {id(parameter) for parameter in parameters if parameter is not None}


def _chosen(model: nn.Module, norms: set[nn.Module], norm: Which) -> set[nn.Module]:
    """The norm layers whose parameters are decayed."""
    if norm == "none" or not norms:
        return set()
    if norm == "all":
        return norms
    try:
        return exposed_norms(model)
    except UntraceableError as reason:
        warnings.warn(
            f"norm='auto' falls back to 'none', which decays no gamma and no beta: {reason}",
            stacklevel=3,
        )
        return set()
