"""A dozen training steps and an evaluation, against the formulas: outputs, gradients and running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Oracle, Ramps, assert_agrees, float32_tolerance
from torch import Tensor

import renorm

pytestmark = pytest.mark.usefixtures("each_backend")

CHANNELS = 6
STEPS = 12
SHAPES = {
    "1d without positions": (13, CHANNELS),
    "1d": (7, CHANNELS, 5),
    "2d": (7, CHANNELS, 4, 3),
    "3d": (5, CHANNELS, 2, 3, 2),
}
LAYERS = {2: renorm.BatchNorm1d, 3: renorm.BatchNorm1d, 4: renorm.BatchNorm2d, 5: renorm.BatchNorm3d}

WIDE = {"r_max": 3.0, "d_max": 5.0}
NARROW = {"r_max": 1.1, "d_max": 0.1}
RAMP = {"r_max": 2.0, "d_max": 1.0, "start": 2, "r_end": 9, "d_end": 6}
SWITCH = {"r_max": 1.5, "d_max": 0.5, "start": 4, "r_end": 4, "d_end": 4}

OPTIONS: dict[str, dict[str, Any]] = {
    "batch norm": {},
    "cumulative average": {"momentum": None},
    "without parameters": {"affine": False},
    "without bias": {"bias": False},
    "large eps": {"eps": 1e-1, "limits": WIDE, "tracking": "std"},
    "std": {"tracking": "std"},
    "total": {"tracking": "total"},
    "renorm, std": {"limits": WIDE, "tracking": "std"},
    "renorm, var": {"limits": WIDE, "tracking": "var"},
    "renorm, total": {"limits": WIDE, "tracking": "total", "momentum": 0.01},
    "renorm, tight": {"limits": NARROW, "tracking": "std", "momentum": 0.01},
    "renorm, ramps": {"limits": RAMP, "tracking": "std", "example_weight": 0.3},
    "renorm, switch": {"limits": SWITCH, "tracking": "std"},
    "renorm, cumulative average": {"limits": WIDE, "tracking": "std", "momentum": None},
    "renorm, without parameters": {"limits": WIDE, "tracking": "std", "affine": False},
    "ghost, smaller last group": {"examples_per_group": 4, "tracking": "total", "example_weight": 0.2},
    "ghost, left-over joins": {"examples_per_group": 3, "tracking": "total"},
    "ghost, pairs": {"examples_per_group": 2, "tracking": "std"},
    "ghost, var": {"examples_per_group": 4},
    "ghost, larger than the batch": {"examples_per_group": 100},
    "ghost renorm": {"examples_per_group": 4, "limits": RAMP, "tracking": "std"},
    "ghost renorm, left-over joins": {"examples_per_group": 3, "limits": NARROW, "tracking": "std", "momentum": None},
    "batch-group": {"examples_per_group": 2, "channels_per_group": 3, "tracking": "total", "example_weight": 0.5},
    "batch-group, whole batch": {"channels_per_group": 2, "tracking": "std", "example_weight": 1.0},
    "batch-group renorm": {
        "examples_per_group": 2, "channels_per_group": 2, "limits": WIDE, "tracking": "total", "example_weight": 0.1,
    },
    "batch-group renorm, std": {
        "examples_per_group": 4, "channels_per_group": 3, "limits": RAMP, "tracking": "std", "bias": False,
    },
    "group": {"examples_per_group": 1, "channels_per_group": 2, "tracking": "total"},
    "layer": {"examples_per_group": 1, "channels_per_group": CHANNELS, "tracking": "total", "example_weight": 1.0},
    "layer renorm": {"examples_per_group": 1, "channels_per_group": CHANNELS, "limits": NARROW, "tracking": "total"},
}  # fmt: skip


def make(rank: int, options: dict[str, Any]) -> tuple[renorm.Norm, Oracle]:
    """A layer with random parameters, and the formulas with the same."""
    options = dict(options)
    limits = options.pop("limits", None)
    layer = LAYERS[rank](CHANNELS, **options, limits=renorm.Limits(**_steps(limits)) if limits else None)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.5, 1.0)
    parameters = {
        name: getattr(layer, name).detach().double().requires_grad_() if getattr(layer, name) is not None else None
        for name in ("weight", "bias")
    }
    options = {name: value for name, value in options.items() if name not in ("affine", "bias")}
    return layer, Oracle(CHANNELS, **options, **parameters, limits=Ramps(**_steps(limits)) if limits else None)


def _steps(limits: dict[str, Any] | None) -> dict[str, Any]:
    return {"start": 0, "r_end": 0, "d_end": 0} | (limits or {})


def batch(shape: tuple[int, ...], step: int) -> Tensor:
    """Channels of different mean and spread, which drift over the steps; groups of examples differ too."""
    per_channel = (-1,) + (1,) * (len(shape) - 2)
    spread = torch.linspace(0.3, 3.0, shape[1]).view(per_channel) * (1 + 0.5 * torch.randn(()).tanh())
    mean = torch.linspace(-2.0, 4.0, shape[1]).view(per_channel) * (1 + step / STEPS)
    return torch.randn(shape) * spread + mean + torch.randn(shape[0], *(1,) * (len(shape) - 1))


def check_steps(layer: renorm.Norm, oracle: Oracle, shape: tuple[int, ...], masked: bool, steps: int) -> None:
    for step in range(steps):
        x = batch(shape, step)
        mask = torch.rand(shape[0], *shape[2:]) < 0.7 if masked else None
        check_step(layer, oracle, x, mask)
    layer.eval()
    x = batch(shape, 0)
    mask = torch.rand(shape[0], *shape[2:]) < 0.7 if masked else None
    exact = oracle.evaluate(x, mask)
    assert_agrees(layer(x, mask), exact, float32_tolerance(oracle))


def check_step(layer: renorm.Norm, oracle: Oracle, x: Tensor, mask: Tensor | None = None) -> None:
    x, exact_x = x.clone().requires_grad_(), x.double().requires_grad_()
    dy = torch.randn(x.shape)
    y, exact_y = layer(x, mask), oracle.train(exact_x, mask)
    tolerance = float32_tolerance(oracle)
    assert_agrees(y, exact_y, tolerance)
    names = [name for name in ("weight", "bias") if getattr(layer, name) is not None]
    actual = torch.autograd.grad(y, [x, *(getattr(layer, name) for name in names)], dy)
    expected = torch.autograd.grad(exact_y, [exact_x, *(getattr(oracle, name) for name in names)], dy.double())
    assert_agrees(actual[0], expected[0], tolerance, scale=oracle.gradient_scale)
    for gradient, exact in zip(actual[1:], expected[1:], strict=True):
        assert_agrees(gradient, exact, tolerance, scale=float(dy.abs().sum()) / CHANNELS)
    assert_agrees(layer.running_mean, oracle.mean)
    assert_agrees(layer.running_var, oracle.var)
    assert layer.num_batches_tracked == oracle.steps


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_training_and_evaluation_agree_with_the_formulas(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    layer, oracle = make(len(shape), options)
    check_steps(layer, oracle, shape, masked=False, steps=STEPS)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(13, CHANNELS), (7, CHANNELS, 4, 3)], ids=["1d", "2d"])
def test_masked_training_and_evaluation_agree_with_the_formulas(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    layer, oracle = make(len(shape), options)
    check_steps(layer, oracle, shape, masked=True, steps=6)


@pytest.mark.parametrize("tracking", ["std", "var", "total"])
@pytest.mark.parametrize("example_weight", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("channels_per_group", [1, 2, 6])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_evaluation_agrees_with_the_formulas(
    shape: tuple[int, ...], channels_per_group: int, example_weight: float, tracking: str
) -> None:
    options = {"channels_per_group": channels_per_group, "example_weight": example_weight, "tracking": tracking}
    layer, oracle = make(len(shape), options)
    layer(x := batch(shape, 3))
    oracle.train(x)
    layer.eval()
    x = batch(shape, 5).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y, exact = layer(x), oracle.evaluate(exact_x)
    tolerance = float32_tolerance(oracle)
    assert_agrees(y, exact, tolerance)
    dy = torch.randn(shape)
    actual = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    expected = torch.autograd.grad(exact, [exact_x, oracle.weight, oracle.bias], dy.double())
    for gradient, exact_gradient in zip(actual, expected, strict=True):
        assert_agrees(gradient, exact_gradient, tolerance, scale=oracle.gradient_scale)


FAMILIES = {
    "BatchNorm": ({}, {"momentum": 0.1, "tracking": "var"}),
    "BatchRenorm": (
        {"limits": renorm.Limits.over(20)},
        {"momentum": 0.01, "tracking": "std", "limits": Ramps(3.0, 5.0, start=1, r_end=6, d_end=4)},
    ),
    "GhostBatchNorm": (
        {"examples_per_group": 4},
        {"momentum": 0.01, "tracking": "total", "examples_per_group": 4},
    ),
    "BatchGroupNorm": (
        {"num_groups": 3},
        {"momentum": 0.01, "tracking": "total", "examples_per_group": 2, "channels_per_group": 2},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("with_dimension", [True, False])
def test_every_named_layer_is_its_setting_of_the_formulas(
    family: str, shape: tuple[int, ...], with_dimension: bool
) -> None:
    options, expected = FAMILIES[family]
    dimension = f"{max(1, len(shape) - 2)}d" if with_dimension else ""
    layer = getattr(renorm, family + dimension)(CHANNELS, **options)
    ones, zeros = torch.ones(CHANNELS, dtype=torch.float64), torch.zeros(CHANNELS, dtype=torch.float64)
    oracle = Oracle(CHANNELS, weight=ones.requires_grad_(), bias=zeros.requires_grad_(), **expected)
    check_steps(layer, oracle, shape, masked=False, steps=8)


def test_batch_renorm_of_the_paper_is_plain_batch_norm_for_5000_steps() -> None:
    layer, plain = renorm.BatchRenorm1d(3), renorm.BatchNorm1d(3)
    x = torch.randn(8, 3) * 4 + 2
    layer.num_batches_tracked.fill_(5_000)
    torch.testing.assert_close(layer(x), plain(x))
    assert not torch.allclose(layer(x), plain(x))


def test_a_ramp_goes_on_where_the_step_counter_says() -> None:
    limits = renorm.Limits(r_max=2.0, d_max=1.0, start=100, r_end=300, d_end=200)
    layer = renorm.BatchRenorm1d(2, limits=limits, affine=False)
    oracle = Oracle(2, momentum=0.01, tracking="std", limits=Ramps(2.0, 1.0, 100, 300, 200))
    layer.num_batches_tracked.fill_(150)
    oracle.steps = 150
    x = torch.randn(16, 2) * 5 + 10
    assert_agrees(layer(x), oracle.train(x))
    assert oracle.corrections == [(1.25, 0.5), (1.25, 0.5)]


def test_training_under_no_grad_moves_the_statistics_and_gives_the_same_output() -> None:
    x = torch.randn(6, 3, 4)
    one, other = renorm.BatchRenorm1d(3), renorm.BatchRenorm1d(3)
    with torch.no_grad():
        silent = one(x)
    assert torch.equal(silent, other(x.requires_grad_()))
    assert not silent.requires_grad
    assert torch.equal(one.running_mean, other.running_mean)
    assert one.num_batches_tracked == 1


def test_inference_mode_evaluates_and_trains() -> None:
    layer = renorm.BatchRenorm2d(3)
    with torch.inference_mode():
        assert layer(torch.randn(4, 3, 2, 2)).shape == (4, 3, 2, 2)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("options", [{}, {"limits": renorm.Limits.constant()}, {"examples_per_group": 2}], ids=str)
def test_the_memory_format_is_kept_forwards_and_backwards(
    memory_format: torch.memory_format, options: dict[str, Any]
) -> None:
    layer = renorm.BatchNorm2d(3, **options)
    x = torch.randn(4, 3, 5, 6).to(memory_format=memory_format).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=memory_format)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "options",
    [{}, {"examples_per_group": 2}, {"examples_per_group": 4}, {"channels_per_group": 3}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_activation_in_place_may_follow(options: dict[str, Any], training: bool) -> None:
    layer = renorm.BatchRenorm2d(6, limits=renorm.Limits.constant(), **options).train(training)
    x = torch.randn(6, 6, 2, 2, requires_grad=True)
    y = torch.nn.functional.relu(layer(x), inplace=True)
    in_place = torch.autograd.grad(y.sum(), [x, layer.weight])
    layer.reset_running_stats()
    apart = torch.autograd.grad(torch.relu(layer(x)).sum(), [x, layer.weight])
    for one, other in zip(in_place, apart, strict=True):
        assert torch.equal(one, other)


def test_the_input_is_left_as_it_is() -> None:
    x = torch.randn(6, 4, 3, 3)
    before = x.clone()
    for options in ({}, {"examples_per_group": 4}, {"channels_per_group": 2}):
        layer = renorm.BatchRenorm2d(4, limits=renorm.Limits.constant(), **options)
        layer(x.requires_grad_()).sum().backward()
        layer.eval()(x)
        layer.example_weight = 0.5
        layer(x)
    assert torch.equal(x, before)


def test_one_input_through_a_layer_twice_gives_both_gradients() -> None:
    layer, oracle = make(3, {"limits": WIDE, "tracking": "std"})
    x = torch.randn(4, CHANNELS, 3, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    (layer(x) * layer(x)).sum().backward()
    (oracle.train(exact) * oracle.train(exact)).sum().backward()
    assert_agrees(x.grad, exact.grad, scale=oracle.gradient_scale)
    assert_agrees(layer.weight.grad, oracle.weight.grad)


@pytest.mark.parametrize("shape", [(130, 4), (6, 4, 5, 5)], ids=["1d", "2d, channels last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_weight_that_is_a_column_of_others_gives_the_right_gradient(shape: tuple[int, ...], training: bool) -> None:
    layers = [(renorm.BatchNorm1d if len(shape) == 2 else renorm.BatchNorm2d)(4).train(training) for _ in range(2)]
    values = torch.rand(4) + 0.5
    layers[0].weight.data = torch.stack([values, values * 0 + 7], 1)[:, 0]
    layers[1].weight.data = values
    x, dy = torch.randn(shape), torch.randn(shape)
    if len(shape) == 4:
        x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    gradients = []
    for layer in layers:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        layer(leaf).backward(dy)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
