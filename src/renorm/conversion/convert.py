"""Changing the norm layers of a model: to ours, and back to nn.BatchNorm."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from ..fusion.model import fuse as fuse_calls
from ..fusion.model import unfuse
from ..fusion.roles import hooked
from ..modules import carry_hooks_over, norms, refuse_wrapped, replace_modules
from ..norm import Norm
from ..substitution import obstacle
from ..workers.pool import Pool
from .containers import Unit, ghost_of, units
from .options import check_options
from .recipe import follow, refuse_options
from .report import ConversionReport, PassedOver, Replacement
from .targets import Where, is_candidate, is_frozen, plain, replacement, require_parameters, selector, target_class

__all__ = ["ConversionReport", "convert", "to_batchnorm"]

Policies = Mapping[type[nn.Module], Callable[[Any], Norm | None]]


def _log(report: ConversionReport) -> None:
    logging.getLogger("renorm.convert").info("%s", report)


def convert(
    model: nn.Module,
    to: type[Norm] | Mapping[str, Any],
    *,
    where: Where | None = None,
    steps: Literal["keep", 0] = "keep",
    policies: Policies | None = None,
    frozen: bool = False,
    fuse: bool = False,
    report: Callable[[ConversionReport], object] = _log,
    **options: Any,
) -> nn.Module:
    """Replace the batch norm layers of a model, in place.

    Replaced are nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm, timm's BatchNormAct2d (its drop and activation stay), the
    ghost batch norm of TabNet and Composer (its size stays) and, for `BatchGroupNorm`, nn.GroupNorm. The new layers
    hold the very same Parameter objects, so an optimizer made before stays valid; buffers, dtype, device, mode,
    requires_grad and hooks are kept, and a layer that is shared stays shared. Either everything is replaced or, on an
    error, nothing.

    Other norm layers stay as they are, and so does a module that consists of batch norms and may call one several times
    a forward: a warning names them.

    Args:
        model: model, not yet wrapped in DDP or FSDP nor compiled; changed in place.
        to: target. A family, as `renorm.BatchRenorm`, picks 1d, 2d or 3d from what it replaces; a single class, as
            `renorm.BatchRenorm2d`, replaces only layers of its dimension. Or what `renorm.recipe` returned, and no
            options: every layer that it names becomes what it says, and a layer of renorm of that class gets the
            settings; other layers stay.
        where: which layers: a function of name and module, or a regular expression searched for in the name.
        steps: where the limits' step starts. "keep", the default, goes on from the layer's own
            num_batches_tracked: a trained layer's running statistics are good, and corrections may be as large as
            they ever get from the first step; an untrained layer is at 0 anyhow. 0 starts over with plain batch
            norm and ramps up again: for a long further training that will change the statistics much.
        policies: what becomes of layers of other classes, and of these: by exact class, a function of the old layer
            that returns a layer of renorm with its weights and statistics, or None to leave it. Mode and hooks are
            added.
        frozen: whether to replace torchvision's FrozenBatchNorm2d and timm's FrozenBatchNormAct2d too, by layers that
            train. Their weight and bias become parameters: make the optimizer afterwards.
        fuse: whether layers also add the residual and apply the activation that follow them, where torch.fx proves
            that the model computes the same. Modules that call the layers get a subclass of their class, with a
            rewritten forward; everything else, the state dict too, is as without.
        report: called with the `ConversionReport`; try `report=print`. By default it goes to the log, at INFO.
        **options: options of the target. eps and the kind of parameters and buffers come from the replaced layer,
            everything else is the target's default unless given. The momentum stays where there are no limits; where
            they have ramps, it is at least `limits.momentum`.

    Returns:
        The model; a new layer if the model itself was one.

    Raises:
        TypeError: `to` is no layer class of renorm, or does not have an option, or needs one; a policy returns
            something else; there are options beside a recipe.
        ValueError: an option does not suit a layer, which is named; its weight is computed by a tool, as in pruning;
            the model is wrapped; `steps=0` meets a cumulative average, which counts with the step; a recipe is of
            another version, or names a layer that is missing or cannot become what it says.

    Warns:
        UserWarning: norm layers were passed over, by name and reason, or nothing was found to replace or
            to fuse.

    Example:
        >>> import renorm
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = convert(model, renorm.BatchRenorm, fuse=True, report=print)
        1 layers replaced, 0 passed over, 1 calls fused, 0 not
          1: BatchNorm2d -> BatchRenorm2d, momentum 0.1 -> 0.01
          1: fused with relu
    """
    if isinstance(to, Mapping):
        own = {"where": where, "steps": steps != "keep", "policies": policies, "frozen": frozen, "fuse": fuse}
        refuse_options([name for name, given in own.items() if given] + list(options))
        return _follow(model, to, report)
    _check_arguments(model, to, steps, options)
    selected, policies = selector(where), policies or {}
    replacements: dict[nn.Module, nn.Module] = {}
    replaced, passed_over = [], []
    for unit in units(model, lambda module: type(module) in policies or is_candidate(module, to)):
        if not unit.selected(selected):
            continue
        policy = policies.get(type(unit.module))
        new = _by_policy(unit, policy) if policy else _equivalent(unit, to, steps, frozen, options)
        if isinstance(new, PassedOver):
            passed_over.append(new)
        elif new is not None:
            replacements[unit.module] = new
            replaced.append(_describe(unit, new))
    result = replace_modules(model, replacements)
    _share_pool(result)
    fused, not_fused = fuse_calls(result) if fuse else ((), ())
    done = ConversionReport(tuple(replaced), tuple(passed_over), fused, not_fused)
    report(done)
    _warn(done, fuse)
    return result


def _follow(model: nn.Module, recipe: Mapping[str, Any], report: Callable[[ConversionReport], object]) -> nn.Module:
    plan = follow(model, recipe)
    result = replace_modules(model, plan.replacements)
    plan.change_settings()
    _share_pool(result)
    fused, not_fused = fuse_calls(result, plan.callers) if plan.callers else ((), ())
    report(ConversionReport(tuple(plan.rows), (), fused, not_fused))
    return result


def to_batchnorm(model: nn.Module) -> nn.Module:
    """Replace our layers by plain nn.BatchNorm, in place: equal at evaluation, and everything else can load it.

    Parameters are the very same objects. Layers made from nn.SyncBatchNorm or nn.GroupNorm, which take any number of
    dimensions, become nn.SyncBatchNorm; timm's BatchNormAct2d comes back as such. With `channels_per_group` above 1
    every channel gets the running statistics of its group. What `convert(fuse=True)` did to the modules that call the
    layers is undone.

    Args:
        model: model, changed in place.

    Returns:
        The model; a new layer if the model itself was one.

    Raises:
        ValueError: nn.BatchNorm cannot do what a layer does, by name and reason, or its weight is computed by a tool,
            as in pruning. The model is left as it was.

    Warns:
        UserWarning: running statistics had to be rounded to a parameter's half precision.

    Example:
        >>> import renorm
        >>> model = to_batchnorm(nn.Sequential(renorm.BatchRenorm2d(8)))
        >>> type(model[0]).__name__
        'BatchNorm2d'
    """
    refuse_wrapped(model)
    ours = norms(model)
    obstacles = [f"{name or '(root)'}: {reason}" for name, layer in ours.items() if (reason := obstacle(layer))]
    if obstacles:
        raise ValueError("nn.BatchNorm cannot do what these layers do:\n  " + "\n  ".join(obstacles))
    for name, layer in ours.items():
        require_parameters(name, layer)
    unfuse(model)
    return replace_modules(model, {layer: plain(layer) for layer in ours.values()})


def _check_arguments(model: nn.Module, to: type[Norm], steps: object, options: dict[str, Any]) -> None:
    if not (isinstance(to, type) and issubclass(to, Norm)):
        raise TypeError(f"to must be a layer class of renorm, as renorm.BatchRenorm, or a recipe, got {to!r}")
    if steps not in ("keep", 0):
        raise ValueError(f"steps must be 'keep' or 0, got {steps!r}")
    check_options(to, options)
    refuse_wrapped(model)


def _by_policy(unit: Unit, policy: Callable[[Any], Norm | None]) -> Norm | None:
    new = policy(unit.module)
    if new is None:
        return None
    if not isinstance(new, Norm):
        raise TypeError(
            f"policies must return a layer of renorm or None, got {type(new).__name__} for "
            f"{type(unit.module).__name__} at {unit.name or 'the root'!r}"
        )
    new.train(unit.module.training)
    carry_hooks_over(unit.module, new)
    return new


def _equivalent(
    unit: Unit, to: type[Norm], steps: Literal["keep", 0], frozen: bool, options: dict[str, Any]
) -> Norm | PassedOver:
    ghost = ghost_of(unit.module)
    name, old = (unit.name, unit.module) if ghost is None else (_join(unit.name, ghost.attribute), ghost.norm)
    target, reason = (None, unit.reason) if unit.reason else target_class(old, to, frozen)
    if ghost is not None and hooked(old):
        target, reason = None, f"there is a hook on {ghost.attribute}, which sees parts of a batch"
    if target is None:
        return PassedOver(unit.name, type(unit.module).__name__, reason)
    if ghost is None:
        return replacement(name, old, target, steps, options)
    new = replacement(name, old, target, steps, {"examples_per_group": ghost.examples_per_group} | options)
    carry_hooks_over(unit.module, new)
    return new


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _describe(unit: Unit, new: Norm) -> Replacement:
    old, ghost = unit.module, ghost_of(unit.module)
    note = "" if new.sync is None else f"sync={new.sync!r}"
    if new.sync is None and isinstance(old, nn.SyncBatchNorm):
        note = "no longer synchronized over processes"
    if ghost is not None:
        old, note = ghost.norm, f"ghost batches of {new.examples_per_group}; its step has counted those, not batches"
    if is_frozen(old):
        note = "weight and bias are parameters now, for an optimizer that is made afterwards"
    momentum = (getattr(old, "momentum", None), new.momentum)
    return Replacement(unit.name, type(unit.module).__name__, type(new).__name__, momentum, note)


def _share_pool(model: nn.Module) -> None:
    """One collective a step for all layers that merge their running statistics among the same workers."""
    by_group: dict[Any, list[Norm]] = {}
    for layer in norms(model).values():
        if layer.sync == "running":
            by_group.setdefault(layer.workers.group, []).append(layer)
    for layers in by_group.values():
        pool = Pool(layers[0].workers, layers)
        for layer in layers:
            layer.synchronize("running", layer.workers, pool)


def _warn(report: ConversionReport, fuse: bool) -> None:
    if report.passed_over:
        rows = "\n  ".join(map(str, report.passed_over))
        warnings.warn(
            f"convert passed over {len(report.passed_over)} layers, which stay as they are (if they should, leave them "
            f"out by where=...; policies={{cls: function}} replaces others):\n  {rows}",
            stacklevel=3,
        )
    elif not report.replaced and not report.fused:  # with our layers in the model, fusing may be all that was wanted
        warnings.warn(
            "convert found no batch norm layer to replace: look at print(model) and at `where`; replaced are "
            "nn.BatchNorm, nn.SyncBatchNorm, timm's BatchNormAct2d and, for BatchGroupNorm, nn.GroupNorm",
            stacklevel=3,
        )
    if fuse and not report.fused:
        warnings.warn("convert found nothing to fuse; report=print says why", stacklevel=3)
