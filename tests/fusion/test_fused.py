"""What convert(fuse=True) fuses computes the same."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import renorm
from fusion.helpers import DOUBLE, Block, batch, check_same, reasons, rows, step
from renorm import convert
from renorm.activation import Activation

ACTIVATIONS: dict[str, tuple[str, Any]] = {
    "nn.ReLU": ("relu", nn.ReLU()),
    "nn.ReLU in place": ("relu", nn.ReLU(inplace=True)),
    "nn.LeakyReLU": ("leaky_relu", nn.LeakyReLU()),
    "nn.SiLU": ("silu", nn.SiLU()),
    "nn.GELU": ("gelu", nn.GELU()),
    "F.relu": ("relu", F.relu),
    "F.relu in place": ("relu", lambda y: F.relu(y, inplace=True)),
    "F.relu in place by position": ("relu", lambda y: F.relu(y, True)),
    "F.relu_": ("relu", F.relu_),
    "torch.relu": ("relu", torch.relu),
    "torch.relu_": ("relu", torch.relu_),
    "Tensor.relu": ("relu", lambda y: y.relu()),
    "Tensor.relu_": ("relu", lambda y: y.relu_()),
    "F.leaky_relu": ("leaky_relu", F.leaky_relu),
    "F.leaky_relu with its default": ("leaky_relu", lambda y: F.leaky_relu(y, 0.01, inplace=True)),
    "F.silu": ("silu", F.silu),
    "F.silu in place": ("silu", lambda y: F.silu(y, inplace=True)),
    "nn.Hardswish": ("hardswish", nn.Hardswish()),
    "nn.Hardswish in place": ("hardswish", nn.Hardswish(inplace=True)),
    "F.hardswish": ("hardswish", F.hardswish),
    "F.hardswish in place": ("hardswish", lambda y: F.hardswish(y, True)),
    "F.gelu": ("gelu", F.gelu),
    "F.gelu with its default": ("gelu", lambda y: F.gelu(y, approximate="none")),
}
ADDS: dict[str, Callable[[Any, Any], Any]] = {
    "y + r": lambda y, r: y + r,
    "r + y": lambda y, r: r + y,
    "y += r": operator.iadd,
    "torch.add": torch.add,
    "torch.add with alpha 1": lambda y, r: torch.add(y, r, alpha=1),
    "Tensor.add": lambda y, r: y.add(r),
    "Tensor.add_": lambda y, r: y.add_(r),
}
activations = pytest.mark.parametrize(("name", "act"), ACTIVATIONS.values(), ids=ACTIVATIONS)
adds = pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)


def applied(act: Any) -> tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module]]:
    """How a block applies an activation, and the modules that it needs for it."""
    if isinstance(act, nn.Module):
        return lambda block, y: block.act(y), {"act": act}
    return lambda block, y: act(y), {}


@activations
def test_an_activation_is_fused(name: str, act: Any) -> None:
    apply, modules = applied(act)
    report = check_same(Block(lambda block, y, x: apply(block, y), **modules), batch())
    assert rows(report) == [("bn", False, name)]
    assert report.not_fused == ()


@activations
def test_a_residual_add_is_fused_with_the_activation_after_it(name: str, act: Any) -> None:
    apply, modules = applied(act)
    assert rows(check_same(Block(lambda block, y, x: apply(block, y + x), **modules), batch())) == [("bn", True, name)]


@adds
def test_every_form_of_a_residual_add_is_fused(add: Any) -> None:
    assert rows(check_same(Block(lambda block, y, x: block.relu(add(y, x))), batch())) == [("bn", True, "relu")]


@adds
def test_a_residual_add_is_fused_without_an_activation(add: Any) -> None:
    assert rows(check_same(Block(lambda block, y, x: add(y, x)), batch())) == [("bn", True, None)]
    report = check_same(Block(lambda block, y, x: torch.tanh(add(y, x))), batch())
    assert rows(report) == [("bn", True, None)]


@pytest.mark.parametrize("build", [lambda: nn.ReLU6(), lambda: nn.Hardswish()], ids=["ReLU6", "Hardswish"])
def test_an_activation_is_fused_as_soon_as_layers_have_it(build: Callable[[], nn.Module]) -> None:
    act = build()
    has_it = type(act).__name__.lower() in get_args(Activation)
    report = check_same(nn.Sequential(nn.BatchNorm2d(6, **DOUBLE), act), batch())
    assert bool(report.fused) == has_it
    assert has_it or reasons(report) == {"0": f"{type(act).__name__} follows"}


def test_a_sequential_keeps_its_modules_and_keys() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1)).double()
    assert rows(check_same(model, batch())) == [("1", False, "relu")]
    modules, keys = list(model), list(model.state_dict())
    convert(model, renorm.BatchRenorm, fuse=True)
    assert [model[i] is modules[i] for i in range(4)] == [True, False, True, True]
    assert list(model.state_dict()) == keys


def test_identities_between_are_passed_through() -> None:
    block = Block(lambda block, y, x: block.relu(block.nothing(block.nothing(y) + x)), nothing=nn.Identity())
    assert rows(check_same(block, batch())) == [("bn", True, "relu")]


def test_one_activation_module_may_follow_many_layers() -> None:
    def after(block: Any, y: Tensor, x: Tensor) -> Tensor:
        return block.relu(block.bn2(block.relu(y)) + x)

    report = check_same(Block(after, bn2=nn.BatchNorm2d(6, **DOUBLE)), batch())
    assert rows(report) == [("bn", False, "relu"), ("bn2", True, "relu")]


def test_a_layer_called_twice_is_fused_with_what_follows_each_call() -> None:
    report = check_same(Block(lambda block, y, x: F.silu(block.bn(block.relu(y))) + torch.tanh(block.bn(x))), batch())
    assert rows(report) == [("bn", False, "relu"), ("bn", False, "silu")]
    assert [row.reason for row in report.not_fused] == ["tanh follows"]


def test_a_block_that_is_used_twice_is_fused_once() -> None:
    block = Block(lambda block, y, x: block.relu(y + x))
    assert rows(check_same(nn.Sequential(block, block), batch())) == [("0.bn", True, "relu")]


def test_of_two_layers_that_are_added_the_later_one_adds() -> None:
    block = Block(lambda block, y, x: block.relu(y + block.bn2(x)), bn2=nn.BatchNorm2d(6, **DOUBLE))
    report = check_same(block, batch())
    assert rows(report) == [("bn2", True, "relu")]
    assert reasons(report) == {"bn": "it is the residual that another layer adds"}


def test_layers_in_a_list_are_fused_by_who_calls_them() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(2))
            self.norms = nn.ModuleDict({name: nn.BatchNorm2d(6) for name in "ab"})

        def forward(self, x: Tensor) -> Tensor:
            for conv, norm in zip(self.convs, self.norms.values(), strict=True):
                x = F.relu(norm(conv(x)))
            return x

    assert rows(check_same(Stack().double(), batch())) == [("norms.a", False, "relu"), ("norms.b", False, "relu")]


def test_one_dimensional_layers_are_fused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU()).double()
    assert rows(check_same(model, batch(5, 6))) == [("1", False, "gelu")]


@pytest.mark.parametrize(
    ("family", "options"),
    [("BatchNorm", {}), ("GhostBatchNorm", {"examples_per_group": 2}), ("BatchGroupNorm", {"num_groups": 3})],
)
def test_every_family_is_fused(family: str, options: dict[str, Any]) -> None:
    block = Block(lambda block, y, x: block.relu(y + x))
    models = [copy.deepcopy(block), copy.deepcopy(block)]
    for model, fuse in zip(models, (False, True), strict=True):
        convert(model, getattr(renorm, family), fuse=fuse, example_weight=0.2, **options)
    x = batch()
    for expected, actual in zip(*(step(model, (x,)) for model in models), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(models[1].eval()(x), models[0].eval()(x))
