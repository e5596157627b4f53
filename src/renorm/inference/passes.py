"""Passes of a model over data: what a batch is, where it goes, what a pass leaves as it was, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..blocks import pushed
from ..conversion.convert import convert
from ..conversion.targets import replacement, target_class
from ..layers import BatchNorm
from ..modules import norms, replace_modules, tracks
from ..norm import Norm
from ..occasions import Accumulation, Frozen

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

ModelCall = Callable[[nn.Module, Any], Any]  # of model and batch


def forward(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch as data loaders give it.

    Args:
        model: the model.
        batch: a tensor; a tuple or list, whose first element is the input; or a mapping, handed over by name without
            "label" and "labels". Moved to the device of the model's first parameter.

    Returns:
        What the model returns.

    Raises:
        TypeError: the batch is something else.
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return model(batch.to(device, non_blocking=True))
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name not in ("label", "labels")}
        return model(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()})
    raise TypeError(
        "a batch must be a tensor, a tuple or list that begins with one, or a mapping; give forward=function of model "
        "and batch for anything else, as forward=lambda model, batch: model(batch[0]), got "
        f"{type(batch).__name__}"
    )


def target(batch: Any) -> Any:
    """The target in a batch as data loaders give it.

    Args:
        batch: a tuple or list of input, target and whatever else; or a mapping with "labels" or "label".

    Returns:
        The target.

    Raises:
        TypeError: there is none.
    """
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    if isinstance(batch, Mapping):
        for name in ("labels", "label"):
            if name in batch:
                return batch[name]
    raise TypeError(
        "a batch must be (input, target) or a mapping with 'label' or 'labels', got "
        + (f"{type(batch).__name__} with {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__)
    )


def arguments(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What a norm layer is called with.

    Args:
        inputs: positional arguments.
        named: arguments by name.

    Returns:
        The input, (N, C, *S), without its graph, and the mask, (N, *S), or None.
    """
    x = inputs[0] if inputs else named["x" if "x" in named else "input"]
    mask = inputs[1] if len(inputs) > 1 else named.get("mask")
    return x.detach(), None if mask is None else mask.expand(x.shape[0], *x.shape[2:])


def renorm_layers(model: nn.Module) -> dict[str, Norm]:
    """The norm layers of a model that have running statistics, torch's replaced by renorm's in place.

    Args:
        model: with layers of renorm or torch.

    Returns:
        Layers by name.

    Raises:
        ValueError: there is none, or the model itself is torch's.

    Warns:
        UserWarning: subclasses of torch's are passed over.
    """
    # one by one, since at evaluation it does not matter how the modules around them call them
    plain = [(name, module) for name, module in model.named_modules() if name and _is_plain(module)]
    targets = {module: target_class(module, BatchNorm)[0] for _, module in plain}
    new: dict[nn.Module, nn.Module] = {
        old: replacement(name, old, cls, "keep", {}) for name, old in plain if (cls := targets[old]) is not None
    }
    replace_modules(model, new)
    if any(map(_is_plain, model.modules())):
        converted = convert(model, BatchNorm, where=lambda _, module: _is_plain(module), report=lambda report: None)
        if converted is not model:
            raise ValueError("model must contain its norm layer: convert(model, renorm.BatchNorm) replaces it itself")
    layers = {name: layer for name, layer in norms(model).items() if layer.has_statistics}
    if not layers:
        raise ValueError(
            "model has no norm layer with running statistics: it must have nn.BatchNorm or layers of renorm, with "
            "track_running_stats=True; subclasses of nn.BatchNorm are passed over"
        )
    return layers


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not isinstance(module, Norm) and tracks(module)


@contextmanager
def modes(model: nn.Module, training: set[nn.Module]) -> Iterator[None]:
    """Put a model into evaluation mode, but for some modules, and restore every module's mode at the end.

    Meanwhile nothing is compiled: neither are a few passes worth it, nor would hooks and example weights be the same.

    Args:
        model: the model.
        training: modules that are in training mode meanwhile.

    Yields:
        Nothing.
    """
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = module in training
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def batch_statistics(
    model: nn.Module, layers: Iterable[Any], blocks: Mapping[Any, Accumulation] | None = None
) -> Iterator[None]:
    """Let norm layers normalize by their batches, everything else as at evaluation, without gradients.

    Args:
        model: the model.
        layers: of renorm or torch.
        blocks: where ours leave the moments of their batches; None for nowhere.

    Yields:
        Nothing. Running statistics and modes are as before at the end.
    """
    layers = list(layers)
    plain = [layer for layer in layers if not isinstance(layer, Norm)]
    before = [
        {name: buffer.clone() for name in _BUFFERS if (buffer := getattr(layer, name)) is not None} for layer in plain
    ]
    frozen = Frozen("batch")
    ours = {layer: frozen if blocks is None else blocks[layer] for layer in layers if isinstance(layer, Norm)}
    try:
        with torch.no_grad(), modes(model, set(layers)), pushed(ours):
            yield
    finally:
        for layer, buffers in zip(plain, before, strict=True):
            for name, buffer in buffers.items():
                getattr(layer, name).copy_(buffer)


@contextmanager
def progress(description: str, total: float, shown: bool) -> Iterator[Callable[[float], None]]:
    """Show a bar on standard error while a block runs.

    Args:
        description: beside the bar.
        total: amount of work, in any unit; as it is known at the start.
        shown: False for no bar.

    Yields:
        A function to be told how much of the work is done.
    """
    bar = _bar() if shown else None
    if bar is None:
        yield lambda done: None
        return
    task = bar.add_task(description, total=total)
    with bar:
        yield lambda done: bar.update(task, completed=done)


def _bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    console = Console(stderr=True)
    watched = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    return Progress(console=console, transient=True) if watched else None
