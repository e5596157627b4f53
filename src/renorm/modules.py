"""What a model holds: its norm layers, who keeps running statistics, and replacing modules with their state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .grouping import Grouping
from .norm import Norm

_WRAPPERS = {
    "DistributedDataParallel": "wrapping in DistributedDataParallel",
    "DataParallel": "wrapping in DataParallel",
    "FullyShardedDataParallel": "sharding",
    "FSDPModule": "sharding",
    "OptimizedModule": "torch.compile",
    "ScriptModule": "scripting",
}


def norms(model: nn.Module) -> dict[str, Norm]:
    """The norm layers of renorm in a model.

    Args:
        model: any model.

    Returns:
        Layers by name, in the order of the model.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, Norm)}


def tracks(module: nn.Module) -> bool:
    """Whether a module is a norm layer, ours or torch's, that has running statistics.

    Args:
        module: any module.

    Returns:
        True for layers of renorm and nn.BatchNorm, and for subclasses of them.
    """
    return isinstance(module, (Norm, _BatchNorm)) and module.running_mean is not None


def tracking_layers(model: nn.Module) -> dict[str, Any]:
    """The norm layers of a model, ours and torch's, that have running statistics.

    Args:
        model: any model.

    Returns:
        Layers by name.

    Raises:
        ValueError: there is none.
    """
    layers = {name: module for name, module in model.named_modules() if tracks(module)}
    if not layers:
        raise ValueError(
            "model has no norm layer with running statistics: it must have nn.BatchNorm or layers of renorm, with "
            "track_running_stats=True"
        )
    return layers


def grouping_of(layer: nn.Module) -> Grouping:
    """Which elements share statistics in a norm layer.

    Args:
        layer: of renorm or torch.

    Returns:
        The layer's own grouping; for torch's the whole batch of a channel.
    """
    return layer.grouping if isinstance(layer, Norm) else Grouping()


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model whose wrapper has taken note of its layers.

    Args:
        model: any model.

    Raises:
        ValueError: the model, or a part of it, is wrapped, sharded, compiled or scripted.
    """
    for name, module in model.named_modules():
        for ancestor in type(module).__mro__:
            if ancestor.__name__ in _WRAPPERS and ancestor.__module__.startswith("torch."):
                raise ValueError(
                    f"model must be converted before {_WRAPPERS[ancestor.__name__]}, "
                    f"got {ancestor.__name__} at {name or 'the root'!r}"
                )


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the place of others, wherever these occur.

    Args:
        model: model, changed in place.
        replacements: new module of each old one.

    Returns:
        The model, or what replaces it.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)


def carry_over(old: Any, new: nn.Module) -> None:
    """Give a new norm layer the very parameters and buffers of an old one, its mode and its hooks.

    Optimizers that hold the parameters stay valid; a weight that is a buffer, as frozen batch norm's, becomes a
    parameter. Running statistics of the old layer in half precision are copied to float32 where the new layer keeps
    float32.

    Args:
        old: layer with weight and bias, and perhaps running statistics.
        new: layer with the same.
    """
    for name in ("weight", "bias"):
        kept = getattr(old, name)
        new.register_parameter(name, nn.Parameter(kept) if name in old._buffers else kept)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        buffer = getattr(old, name, None)
        if buffer is not None:
            kept = new.get_buffer(name)
            new.register_buffer(name, buffer.to(torch.promote_types(buffer.dtype, kept.dtype)))
    new.train(old.training)
    carry_hooks_over(old, new)


def carry_hooks_over(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of another one.

    Args:
        old: module with hooks, or without.
        new: module to have the same.
    """
    vars(new).update({name: value for name, value in vars(old).items() if "_hook" in name})
