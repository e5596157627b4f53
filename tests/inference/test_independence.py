"""At evaluation an example's output is its own: it does not change by a bit when the others in its batch do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm

LAYERS: dict[str, tuple[type[renorm.Norm], tuple[Any, ...], dict[str, Any]]] = {
    "batch norm": (renorm.BatchNorm2d, (8,), {}),
    "batch renorm": (renorm.BatchRenorm2d, (8,), {}),
    "ghost": (renorm.GhostBatchNorm2d, (8, 2), {}),
    "batch-group": (renorm.BatchGroupNorm2d, (8, 4), {}),
    "group": (renorm.BatchGroupNorm2d, (8, 4), {"examples_per_group": 1}),
    "activated": (renorm.BatchRenorm2d, (8,), {"act": "relu"}),
}
every_layer = pytest.mark.parametrize(("cls", "arguments", "options"), LAYERS.values(), ids=LAYERS)
every_weight = pytest.mark.parametrize("example_weight", [0.0, 0.3, 1.0])


def trained(layer: nn.Module) -> nn.Module:
    for _ in range(3):
        layer(torch.randn(8, 8, 5, 5) * 2 + 1)
    return layer.eval()


def others_change(x: Tensor, kept: int) -> Tensor:
    changed = torch.randn_like(x) * 100 + 30
    changed[kept] = x[kept]
    return changed


@pytest.mark.usefixtures("each_backend")
@every_layer
@every_weight
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_neighbours_do_not_change_an_output(
    cls: type[renorm.Norm], arguments: tuple[Any, ...], options: dict[str, Any], example_weight: float,
    dtype: torch.dtype, memory_format: torch.memory_format,
) -> None:  # fmt: skip
    layer = trained(cls(*arguments, **options, example_weight=example_weight))
    x = torch.randn(6, 8, 5, 5, dtype=dtype).contiguous(memory_format=memory_format)
    with torch.no_grad():
        expected = layer(x)
        for kept in range(len(x)):
            assert torch.equal(layer(others_change(x, kept))[kept], expected[kept])


@pytest.mark.usefixtures("each_backend")
@every_weight
def test_neighbours_of_other_lengths_do_not_change_an_output(example_weight: float) -> None:
    layer = trained_on_sequences(renorm.BatchRenorm1d(8, example_weight=example_weight))
    x = torch.randn(6, 8, 7)
    lengths = torch.tensor([7, 3, 5, 1, 6, 2])
    with torch.no_grad():
        expected = layer(x, mask=torch.arange(7) < lengths[:, None])
        for kept in range(len(x)):
            other = lengths.flip(0).clone()
            other[kept] = lengths[kept]
            found = layer(others_change(x, kept), mask=torch.arange(7) < other[:, None])
            assert torch.equal(found[kept], expected[kept])


def trained_on_sequences(layer: nn.Module) -> nn.Module:
    layer(torch.randn(8, 8, 7) * 2 + 1)
    return layer.eval()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("remedy", ["weigh", "estimate"])
def test_neighbours_do_not_change_what_a_mended_network_says(remedy: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten()
    )
    x = torch.randn(6, 3, 7, 7)
    if remedy == "estimate":
        renorm.estimate(model, [x])
    else:
        renorm.weigh(model, [(x, torch.zeros(6))], lambda y, _: -y.square().mean(1), higher_is_better=True)
        for layer in (model[1], model[4]):
            layer.example_weight = 0.4
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert not torch.equal(copy.deepcopy(model).train()(others_change(x, 2))[2], expected[2])
        for kept in range(len(x)):
            assert torch.equal(model(others_change(x, kept))[kept], expected[kept])
