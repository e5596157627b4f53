"""The settings of a model's norm layers as data, to be kept beside a state dict, which has none of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from torch import nn

from .. import layers
from ..fusion.model import FusedForward
from ..fusion.norm_act import ACT_LAYERS, NormAct
from ..layers import BatchGroupNorm
from ..limits import Limits
from ..modules import refuse_wrapped
from ..norm import Norm
from ..workers.group import LOST, Workers
from .containers import ghost_of
from .report import Replacement
from .targets import is_candidate, replacement, target_class

_VERSION = 1
_KEYS = ("version", "layers", "fused")
_SETTINGS = (
    "class", "eps", "momentum", "limits", "examples_per_group", "channels_per_group", "tracking", "example_weight",
    "act", "sync", "process_group", "frozen",
)  # fmt: skip
_LIMITS = tuple(field.name for field in fields(Limits))
_CLASSES = {kind.__name__: kind for kind in vars(layers).values() if isinstance(kind, type) and issubclass(kind, Norm)}
_ACT_CLASSES = {act.__name__: kind for kind, act in ACT_LAYERS.items()}
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # which a fresh model may be without


def recipe(model: nn.Module) -> dict[str, Any]:
    """The settings of a model's norm layers, which a state dict does not hold.

    `renorm.convert(model, recipe)` applies them to a fresh model, before or after its state dict is loaded. In it are
    the layers of renorm by name, each with its class, eps, momentum, limits, groups, tracking rule, example weight,
    activation, sync and `frozen`, and which calls are fused. Not in it are sizes, parameters and buffers, which the
    fresh model has, other modules, and process groups, which belong to a process: without a group `sync` is among all
    workers, with one the layers ask for `renorm.synchronize` once torch.distributed is initialized.

    Args:
        model: with layers of renorm, compiled or sharded or not; of DistributedDataParallel give its `module`.

    Returns:
        Numbers, text, lists and dicts, which JSON takes (infinity is the text "inf") and
        `torch.load(..., weights_only=True)` too.

    Example:
        >>> import json, renorm
        >>> model = renorm.convert(nn.Sequential(nn.BatchNorm1d(3)), renorm.BatchRenorm, limits=Limits.over(1_000))
        >>> model[0].example_weight = 0.2
        >>> text = json.dumps(recipe(model))
        >>> again = renorm.convert(nn.Sequential(nn.BatchNorm1d(3)), json.loads(text))
        >>> again[0].limits == Limits.over(1_000), again[0].example_weight
        (True, 0.2)
    """
    modules = {_plain_name(name): module for name, module in model.named_modules()}
    return {
        "version": _VERSION,
        "layers": {name: _settings(module) for name, module in modules.items() if isinstance(module, Norm)},
        "fused": [name for name, module in modules.items() if _is_fused(module)],
    }


class Following(NamedTuple):
    """What it takes to make a model's layers what a recipe says; nothing of it can fail any more.

    Args:
        replacements: new layer of each old one, complete.
        rows: of the report, one for each.
        changes: layers of ours that are there already, with one of the settings that each is to have.
        process_groups: of these, as a recipe has them.
        callers: modules to fuse calls in, as they are after the replacement; empty if the recipe names none.
    """

    replacements: dict[nn.Module, nn.Module]
    rows: list[Replacement]
    changes: dict[Norm, Norm]
    process_groups: dict[Norm, str | None]
    callers: set[nn.Module]

    def change_settings(self) -> None:
        """Give the layers that are there their settings."""
        for layer, other in self.changes.items():
            layer.eps, layer.momentum, layer.estimates = other.eps, other.momentum, False
            layer.limits, layer.grouping, layer.tracking = other.limits, other.grouping, other.tracking
            layer.example_weight, layer.frozen = other.example_weight, other.frozen
            if not isinstance(layer, NormAct):
                layer.act = other.act
            _synchronize(layer, other.sync, self.process_groups[layer])


def follow(model: nn.Module, recipe: Mapping[str, Any]) -> Following:
    """Prepare what a recipe says, without changing the model.

    Args:
        model: that has the layers that the recipe names.
        recipe: as `renorm.recipe` returns it.

    Returns:
        What is to be done.

    Raises:
        TypeError: a setting is of another kind.
        ValueError: the recipe is of another version or form, a layer is missing or cannot become what the recipe
            says, or layers are to be replaced in a model that is wrapped.
    """
    missing = [name or "(root)" for name in missing_names(model, recipe)]
    if missing:
        raise ValueError(
            f"model lacks what the recipe names: {', '.join(missing)}; build the model as it was when renorm.recipe "
            "was called, and give convert the same part of it"
        )
    modules = _modules(model)
    found = Following({}, [], {}, {}, set())
    for name, settings in recipe["layers"].items():
        old = modules[name]
        ghost = ghost_of(old)
        source = old if ghost is None else ghost.norm
        pattern = _pattern(name, source, settings)
        if isinstance(old, Norm) and type(old).__name__ == settings["class"]:
            found.changes[old], found.process_groups[old] = pattern, settings["process_group"]
        elif old not in found.replacements:
            found.replacements[old] = new = _replacement(name, source, pattern, settings)
            momentum = (getattr(old, "momentum", None), new.momentum)
            found.rows.append(Replacement(name, type(old).__name__, type(new).__name__, momentum))
    if recipe["fused"]:
        callers = [module for name, module in modules.items() if name in recipe["fused"] or _is_fused(module)]
        found.callers.update(found.replacements.get(module, module) for module in callers)
    if found.replacements or found.callers:
        refuse_wrapped(model)
    return found


def missing_names(model: nn.Module, recipe: Mapping[str, Any]) -> list[str]:
    """What a recipe names and a model does not have.

    Args:
        model: any model.
        recipe: as `renorm.recipe` returns it.

    Returns:
        Names of layers and of modules with fused calls.

    Raises:
        ValueError: the recipe is of another version or form.
    """
    _check_form(recipe)
    modules = _modules(model)
    return [name for name in (*recipe["layers"], *recipe["fused"]) if name not in modules]


def refuse_options(given: Iterable[str]) -> None:
    """Refuse what says the same as a recipe, or something else.

    Args:
        given: names of what `convert` was given besides.

    Raises:
        TypeError: there are some.
    """
    options = ", ".join(given)
    if options:
        raise TypeError(f"a recipe says everything: give convert(model, recipe) without {options}")


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {_plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_fused(module: nn.Module) -> bool:
    return module.fused if isinstance(module, NormAct) else isinstance(module, FusedForward)


def _settings(layer: Norm) -> dict[str, Any]:
    return {
        "class": type(layer).__name__,
        "eps": float(layer.eps),
        "momentum": None if layer.momentum is None else float(layer.momentum),
        "limits": None if layer.limits is None else {k: _number(v) for k, v in asdict(layer.limits).items()},
        "examples_per_group": layer.examples_per_group,
        "channels_per_group": layer.channels_per_group,
        "tracking": layer.tracking,
        "example_weight": layer.example_weight,
        "act": layer.act if isinstance(layer.act, str) else None,  # timm's is a module of the model
        "sync": layer.sync,
        "process_group": None if layer.workers.group is None else LOST,
        "frozen": layer.frozen,
    }


def _number(value: Any) -> float | int | str:
    """As strict JSON has it, which knows no infinity."""
    number = value if isinstance(value, int) else float(value)
    return "inf" if number == math.inf else number


def _check_form(recipe: Mapping[str, Any]) -> None:
    if recipe.get("version") != _VERSION:
        raise ValueError(
            f"recipe must be of version {_VERSION}, as renorm.recipe(model) returns it, got version "
            f"{recipe.get('version')!r}: a newer one needs a newer renorm"
        )
    _check_keys("the recipe", recipe, _KEYS)
    for name, settings in recipe["layers"].items():
        _check_keys(f"layer {name or '(root)'!r}", settings, _SETTINGS)
        if settings["limits"] is not None:
            _check_keys(f"limits of layer {name or '(root)'!r}", settings["limits"], _LIMITS)


def _check_keys(where: str, given: Mapping[str, Any], expected: tuple[str, ...]) -> None:
    if set(given) != set(expected):
        raise ValueError(f"recipe must have the keys {', '.join(expected)} in {where}, got {', '.join(given)}")


def _pattern(name: str, old: Any, settings: Mapping[str, Any]) -> Norm:
    """A layer with the settings, on no device, which refuses what does not suit the old one's channels."""
    tracks = not hasattr(old, "running_mean") or old.running_mean is not None  # group norm gets statistics
    limits = settings["limits"]
    try:
        pattern = Norm(
            getattr(old, "num_features", getattr(old, "num_channels", settings["channels_per_group"])),
            settings["eps"], settings["momentum"], affine=False, track_running_stats=tracks, device="meta",
            limits=None if limits is None else Limits(**limits | {key: float(limits[key]) for key in _LIMITS[:2]}),
            examples_per_group=settings["examples_per_group"], channels_per_group=settings["channels_per_group"],
            tracking=settings["tracking"], example_weight=settings["example_weight"], act=settings["act"],
            sync=settings["sync"],
        )  # fmt: skip
        pattern.frozen = settings["frozen"]
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot convert {name or 'the root'!r}: {error}") from error
    return pattern


def _replacement(name: str, old: Any, pattern: Norm, settings: Mapping[str, Any]) -> Norm:
    target = _target(name, old, settings["class"])
    options: dict[str, Any] = {
        "eps": pattern.eps, "momentum": pattern.momentum, "limits": pattern.limits,
        "examples_per_group": pattern.examples_per_group, "tracking": pattern.tracking,
        "example_weight": pattern.example_weight,
    }  # fmt: skip
    if issubclass(target, BatchGroupNorm):
        options["num_groups"] = pattern.num_features // pattern.channels_per_group
    else:
        options["channels_per_group"] = pattern.channels_per_group
    if not issubclass(target, NormAct):
        options["act"] = pattern.act
    new = replacement(name, old, target, "keep", options)
    new.frozen = pattern.frozen
    _synchronize(new, pattern.sync, settings["process_group"])
    return new


def _synchronize(layer: Norm, sync: Any, process_group: str | None) -> None:
    if layer.sync != sync:  # a layer that is synchronized so already keeps its process group, which no recipe has
        layer.synchronize(sync, Workers(process_group))


def _target(name: str, old: nn.Module, wanted: str) -> type[Norm]:
    """The class that a recipe names, if it can replace a layer."""
    kind = _ACT_CLASSES.get(wanted) or _CLASSES.get(wanted)
    if kind is None:
        raise ValueError(
            f"cannot convert {name or 'the root'!r} to {wanted!r}, which is no class of renorm: build the model with it"
        )
    found, reason = None, "it is no batch norm"
    if is_candidate(old, kind):
        found, reason = target_class(old, kind, frozen=True)
    if found is not None:
        reason = f"it can become {found.__name__}"
    # a family takes what its 2d layer takes, but not the activation that a layer with one has
    if found is None or not issubclass(found, kind) or issubclass(found, NormAct) != (wanted in _ACT_CLASSES):
        raise ValueError(
            f"cannot convert {name or 'the root'!r}, a {type(old).__name__}, to {wanted}, as the recipe says: {reason}"
        )
    return ACT_LAYERS[kind] if wanted in _ACT_CLASSES else kind
