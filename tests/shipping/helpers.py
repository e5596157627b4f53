"""Trained models for shipping: ours, and torch's with the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import renorm


class Block(nn.Module):
    """Convolutions with norm layers, an activation and a residual add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + x).relu()


def plain() -> nn.Module:
    """A small network of torch's layers, with the numbers of a trained one, at evaluation."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 8), nn.BatchNorm1d(8),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            fill(module)
    return model.eval()


def fill(layer: nn.Module) -> None:
    """Give a norm layer the numbers of a trained one."""
    for name, tensor in layer.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 2.0) if name.endswith("running_var") else nn.init.normal_(tensor)


def converted(model: nn.Module, example_weight: float = 0.0, **options: Any) -> nn.Module:
    """The same model with layers of ours."""
    model = renorm.convert(copy.deepcopy(model), renorm.BatchRenorm, **options)
    for module in model.modules():
        if isinstance(module, renorm.Norm):
            module.example_weight = example_weight
    return model


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 9, 9)


def same(ours: nn.Module, theirs: nn.Module) -> None:
    """Assert that state and outputs are equal bit for bit."""
    one, other = ours.state_dict(), theirs.state_dict()
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name
    x = images().to(next(ours.parameters()).dtype)
    assert torch.equal(ours(x), theirs(x))


# family, shape of an example, options: every number of dimensions, groups of channels, activations
LAYERS: list[tuple[type[renorm.Norm], tuple[int, ...], dict[str, Any]]] = [
    (renorm.BatchRenorm1d, (8,), {}),
    (renorm.BatchRenorm1d, (8,), {"channels_per_group": 4, "act": "silu"}),
    (renorm.BatchRenorm1d, (8, 7), {"act": "gelu"}),
    (renorm.BatchGroupNorm1d, (8, 7), {"num_groups": 2}),
    (renorm.BatchRenorm2d, (8, 4, 5), {"act": "relu6", "affine": False}),
    (renorm.BatchGroupNorm2d, (8, 4, 5), {"num_groups": 4, "act": "leaky_relu"}),
    (renorm.BatchRenorm3d, (8, 3, 4, 5), {"act": "relu", "bias": False}),
    (renorm.BatchRenorm3d, (8, 3, 4, 5), {"channels_per_group": 2}),
]


class Every(nn.Module):
    """A layer of every kind with a residual, and one with a mask: in one model, since an export takes seconds."""

    def __init__(self, example_weight: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(cls(8, example_weight=example_weight, **options) for cls, _, options in LAYERS)
        self.masked = renorm.BatchRenorm1d(8, example_weight=example_weight)
        for layer in (*self.layers, self.masked):
            fill(layer)
        self.eval()

    def forward(self, inputs: list[Tensor], residuals: list[Tensor], sequence: Tensor, mask: Tensor) -> list[Tensor]:
        outputs = [layer(x, residual=r) for layer, x, r in zip(self.layers, inputs, residuals, strict=True)]
        return [*outputs, self.masked(sequence, mask)]


def inputs_of_every(n: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Inputs of `Every`; the first example of the mask is masked wholly."""
    mask = torch.rand(n, 7) > 0.3
    mask[0] = False
    inputs, residuals = ([torch.randn(n, *shape) for _, shape, _ in LAYERS] for _ in range(2))
    return inputs, residuals, torch.randn(n, 8, 7), mask


def shapes_of_every(batch: Any) -> tuple[Any, ...]:
    """Dynamic shapes of `Every`."""
    return [{0: batch}] * len(LAYERS), [{0: batch}] * len(LAYERS), {0: batch}, {0: batch}
