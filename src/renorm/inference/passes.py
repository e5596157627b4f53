"""Passes of a model over data: what a batch is, where it goes, and what a pass leaves as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]


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
        f"and batch for anything else, got {type(batch).__name__}"
    )


@contextmanager
def modes(model: nn.Module, training: set[nn.Module]) -> Iterator[None]:
    """Put a model into evaluation mode, but for some modules, and restore every module's mode at the end.

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
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
