"""captum, which asks modules for their kind: nonlinear ones are known by type."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm

from .helpers import converted, images, layers, network

captum = pytest.importorskip("captum.attr")
pytestmark = pytest.mark.filterwarnings("ignore")  # captum's, of its hooks


def deep_lift(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """Attributions, and how far they are from adding up."""
    found, delta = captum.DeepLift(model.eval()).attribute(
        x, torch.zeros_like(x), target=1, return_convergence_delta=True
    )
    return found, float(delta.abs().max())


def active(**options: Any) -> nn.Sequential:
    """The network with its activations inside of the layers."""
    plain = network()
    return converted(nn.Sequential(*(m for m in plain if not isinstance(m, nn.ReLU))), act="relu", **options)


@pytest.mark.parametrize("fuse", [False, True])
def test_deep_lift_sees_what_it_sees_in_torch_s_layers(fuse: bool) -> None:
    plain, x = network(), images(4)
    ours = converted(plain, fuse=fuse)
    (found, error), (expected, _) = deep_lift(ours, x), deep_lift(plain, x)
    torch.testing.assert_close(found, expected)
    assert error < 1e-5


def test_deep_lift_does_not_see_an_activation_inside_a_layer() -> None:
    model = active()
    x = images(4)
    _, error = deep_lift(model, x)
    assert error > 1e-3
    apart = []
    for module in model:
        apart.append(module)
        if isinstance(module, renorm.Norm):
            module.act = None
            apart.append(nn.ReLU())
    _, error = deep_lift(nn.Sequential(*apart), x)
    assert error < 1e-5


def test_deep_lift_takes_an_example_weight_for_none() -> None:
    model, x = converted(network(), example_weight=0.2), images(4)
    assert deep_lift(model, x)[1] > 1e-3
    for layer in layers(model):
        layer.example_weight = 0.0
    assert deep_lift(model, x)[1] < 1e-5


def test_gradients_take_everything_into_account() -> None:
    model, x = active(example_weight=0.2).eval(), images(4)
    _, error = captum.IntegratedGradients(model).attribute(
        x, torch.zeros_like(x), target=1, n_steps=200, return_convergence_delta=True
    )
    assert error.abs().max() < 0.02


def test_layer_wise_relevance_asks_for_a_rule() -> None:
    rules = pytest.importorskip("captum.attr._utils.lrp_rules")

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
            self.pool, self.head = nn.AvgPool2d(6), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.pool(self.relu(self.norm(self.conv(x)))).flatten(1))
            return y

    plain, x = Pooled(), images(4)
    plain(x)
    ours = converted(plain).eval()
    with pytest.raises(TypeError, match=r"BatchRenorm2d'> has no rule defined"):
        captum.LRP(copy.deepcopy(ours)).attribute(x, target=1)
    for layer in layers(ours):
        layer.rule = rules.EpsilonRule()
    expected = captum.LRP(plain.eval()).attribute(x, target=1)
    torch.testing.assert_close(captum.LRP(ours).attribute(x, target=1), expected)
