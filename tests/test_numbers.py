"""float32 where it hurts: large means, many elements, small and large variances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Oracle, Ramps, assert_agrees
from torch import Tensor

import renorm

pytestmark = pytest.mark.usefixtures("each_backend")

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
layouts = pytest.mark.parametrize("memory_format", LAYOUTS.values(), ids=LAYOUTS)
OPTIONS: dict[str, dict[str, Any]] = {
    "batch": {},
    "ghost": {"examples_per_group": 4},
    "ghost, smaller last group": {"examples_per_group": 5},
    "channel groups": {"channels_per_group": 2},
}


def far(mean: float, std: float, shape: tuple[int, ...] = (8, 4, 16, 16)) -> Tensor:
    return torch.randn(shape) * std + mean


@layouts
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("limits", [None, (3.0, 5.0)], ids=["batch norm", "renorm"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_mean_of_ten_thousand_standard_deviations(
    memory_format: torch.memory_format, masked: bool, limits: tuple[float, float] | None, options: dict[str, Any]
) -> None:
    constant = renorm.Limits.constant(*limits) if limits else None
    layer = renorm.BatchNorm2d(4, momentum=0.5, tracking="std", limits=constant, **options)
    ramps = Ramps(*limits) if limits else None
    oracle = Oracle(4, momentum=0.5, tracking="std", limits=ramps, **options)
    for _ in range(4):
        x = far(1e4, 1.0).to(memory_format=memory_format).requires_grad_()
        exact_x = x.detach().double().requires_grad_()
        mask = torch.rand(8, 16, 16) < 0.7 if masked else None
        y, exact_y = layer(x, mask), oracle.train(exact_x, mask)
        dy = torch.randn_like(x)
        assert_agrees(y, exact_y, 1e-3)
        (dx,), (exact_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(exact_y, exact_x, dy.double())
        assert_agrees(dx, exact_dx, 1e-3)
        assert_agrees(layer.running_mean, oracle.mean, 1e-6)
        assert_agrees(layer.running_var, oracle.var, 1e-3)
    assert_agrees(layer.eval()(x, mask), oracle.evaluate(x, mask), 1e-3)
    layer.example_weight = oracle.example_weight = 0.5
    assert_agrees(layer(x, mask), oracle.evaluate(x, mask), 1e-3)


@layouts
@pytest.mark.parametrize("tracking", ["std", "var", "total"])
def test_statistics_settle_at_mean_ten_thousand(memory_format: torch.memory_format, tracking: Any) -> None:
    layer = renorm.BatchNorm2d(4, momentum=0.1, tracking=tracking, affine=False)
    layer.running_mean.fill_(1e4)
    for _ in range(60):
        layer(far(1e4, 1.0, (4, 4, 16, 16)).to(memory_format=memory_format))
    assert_agrees(layer.running_mean, torch.full((4,), 1e4), 1e-5)
    assert_agrees(layer.running_var, torch.ones(4), 0.05)


@layouts
@pytest.mark.parametrize("std", [1e-6, 1e-2, 1e6, 1e12], ids="{:g}".format)
def test_any_scale_is_normalized(memory_format: torch.memory_format, std: float) -> None:
    layer, oracle = renorm.BatchNorm2d(4, eps=1e-5 * std**2), Oracle(4, eps=1e-5 * std**2)
    x = far(std, std).to(memory_format=memory_format)
    assert_agrees(layer(x), oracle.train(x))
    assert_agrees(layer.running_mean, oracle.mean)
    assert_agrees(layer.running_var, oracle.var)


@pytest.mark.parametrize("value", [0.0, 1.0, -1234.567, 1e4, 1e15])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_constant_input_gives_the_bias(value: float, options: dict[str, Any]) -> None:
    layer = renorm.BatchNorm2d(4, **options)
    layer.bias.data.copy_(torch.arange(4.0))
    x = torch.full((8, 4, 3, 3), value)
    expected = torch.arange(4.0).view(4, 1, 1).expand_as(x)
    # the mean of equal numbers is off by rounding, which eps = 1e-5 enlarges 316 times
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=max(1e-6, 316 * 1.2e-7 * abs(value)))
    if abs(value) < 1e4:
        torch.testing.assert_close(layer.running_var, torch.full((4,), 0.9), rtol=1e-4, atol=1e-4)


def test_the_first_example_may_be_far_from_all_others() -> None:
    x = torch.randn(64, 3, 8)
    x[0] += 1000.0
    layer, oracle = renorm.BatchNorm1d(3), Oracle(3)
    assert_agrees(layer(x), oracle.train(x))
    assert_agrees(layer.running_var, oracle.var)


@layouts
@pytest.mark.parametrize("options", [{}, {"limits": renorm.Limits.constant()}], ids=["batch norm", "renorm"])
def test_millions_of_elements_per_channel(memory_format: torch.memory_format, options: dict[str, Any]) -> None:
    x = (torch.rand(12, 2, 1024, 512) + 3).to(memory_format=memory_format).requires_grad_()
    layer = renorm.BatchNorm2d(2, momentum=1.0, **options)
    y = layer(x)
    exact = x.detach().double()
    mean, var = exact.mean((0, 2, 3)), exact.var((0, 2, 3))
    assert_agrees(layer.running_mean, mean)
    assert_agrees(layer.running_var, var, 2e-5)
    y.backward(torch.ones_like(x))
    assert_agrees(layer.bias.grad, torch.full((2,), 12.0 * 1024 * 512))
    mu, sigma = (mean, var) if not options else (torch.zeros(2), torch.ones(2))
    rows = y[0, :, 0].detach().double()
    if not options:
        assert_agrees(rows, (exact[0, :, 0] - mu[:, None]) / (sigma[:, None] + 1e-5).sqrt(), 2e-5)


@layouts
def test_more_elements_per_channel_than_float32_can_count(memory_format: torch.memory_format) -> None:
    x = (torch.rand(20, 2, 1024, 1024) + 3).to(memory_format=memory_format)
    assert x.numel() // 2 > 2**24
    layer = renorm.BatchNorm2d(2, momentum=1.0)
    with torch.no_grad():
        layer(x)
    assert_agrees(layer.running_mean, torch.full((2,), 3.5), 1e-4)
    assert_agrees(layer.running_var, torch.full((2,), 1 / 12), 1e-3)


@pytest.mark.parametrize("momentum", [1.0, None])
@pytest.mark.parametrize("tracking", ["std", "var", "total"])
@pytest.mark.parametrize(("mean", "std"), [(1e-3, 1e-4), (1e-3, 1e-2), (50.0, 2.0)], ids=str)
def test_a_first_batch_of_weight_one_leaves_nothing_of_what_was_before(
    momentum: float | None, tracking: Any, mean: float, std: float
) -> None:
    layer = renorm.BatchNorm1d(3, eps=1e-9, momentum=momentum, tracking=tracking)
    layer.running_mean.fill_(mean if tracking == "total" else 1e3)
    layer.running_var.fill_(1e3)
    x = torch.randn(50, 3) * std + mean
    layer(x)
    assert_agrees(layer.running_mean, x.double().mean(0))
    assert_agrees(layer.running_var, x.double().var(0, correction=int(tracking == "var")), 1e-4)
