"""Small networks, and the same with our layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import renorm

LIMITS = {"constant": renorm.Limits.constant(), "ramps": renorm.Limits.over(40)}


def network(channels: int = 8) -> nn.Sequential:
    """Convolutions with batch norm, which a few batches have passed."""
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4),
    )  # fmt: skip
    for layer in (model[1], model[4]):
        nn.init.uniform_(layer.weight, 0.5, 2.0)
        nn.init.normal_(layer.bias)
    with torch.no_grad():
        for _ in range(20):
            model(images())
    return model


def images(number: int = 16) -> Tensor:
    """Independent images."""
    return 2 * torch.randn(number, 3, 8, 8) + 1


def converted(model: nn.Module, to: type[renorm.Norm] = renorm.BatchRenorm, **options: Any) -> Any:
    """A copy of a model, with our layers."""
    return renorm.convert(copy.deepcopy(model), to, **options)


def layers(model: nn.Module) -> list[renorm.Norm]:
    """Our layers in a model."""
    return [layer for layer in model.modules() if isinstance(layer, renorm.Norm)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all running means and variances."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


def moved(model: nn.Module, do: Callable[[], object]) -> float:
    """How far running statistics move at most."""
    before = statistics(model)
    do()
    after = statistics(model)
    return max(float((after[name] - before[name]).abs().max()) for name in before)
