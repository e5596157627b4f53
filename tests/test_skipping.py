"""Batches that carry no statistics: not finite, empty, or a single element; and nothing that waits for the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import Oracle, Ramps, assert_agrees
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import renorm

pytestmark = pytest.mark.usefixtures("each_backend")

SETTINGS: dict[str, dict[str, Any]] = {
    "batch norm": {},
    "renorm": {"limits": renorm.Limits.constant(), "tracking": "std"},
    "cumulative average": {"momentum": None},
    "ghost": {"examples_per_group": 2, "tracking": "total"},
    "ghost, smaller last group": {"examples_per_group": 4, "tracking": "std"},
    "batch-group renorm": {"examples_per_group": 2, "channels_per_group": 2, "limits": renorm.Limits.over(20)},
}
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


def state(layer: renorm.Norm) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


@settings
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_one_value_that_is_not_finite_leaves_all_statistics_and_the_step(
    options: dict[str, Any], junk: float, masked: bool
) -> None:
    layer = renorm.Norm(4, **options)
    layer(torch.randn(6, 4, 5))
    before = state(layer)
    x = torch.randn(6, 4, 5)
    x[3, 1, 2] = junk
    mask = torch.ones(6, 5, dtype=torch.bool) if masked else None
    layer(x, mask)
    for name, tensor in state(layer).items():
        assert torch.equal(tensor, before[name]), name
    assert layer.num_batches_skipped == 1


@settings
def test_the_batch_after_one_that_is_not_finite_is_as_if_that_had_not_been(options: dict[str, Any]) -> None:
    first, second = torch.randn(6, 4, 5), torch.randn(6, 4, 5) * 2 + 1
    layer, untroubled = renorm.Norm(4, **options), renorm.Norm(4, **options)
    layer(first), untroubled(first)
    layer(torch.full((6, 4, 5), math.nan))
    assert torch.equal(layer(second), untroubled(second))
    for actual, expected in zip(state(layer).values(), state(untroubled).values(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("tracking", ["std", "var", "total"])
def test_values_whose_variance_overflows_float32_are_skipped(tracking: Any) -> None:
    layer = renorm.BatchNorm1d(2, tracking=tracking)
    layer(torch.tensor([[1e30, 1.0], [-1e30, 2.0]]))
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (0, 1)
    assert torch.equal(layer.running_var, torch.ones(2))


def test_skipped_batches_are_counted_one_by_one() -> None:
    layer = renorm.BatchRenorm1d(2)
    for batch in (torch.randn(4, 2), torch.full((4, 2), math.nan), torch.randn(4, 2), torch.full((4, 2), math.inf)):
        layer(batch)
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (2, 2)


def test_an_amp_overflow_in_one_step_does_not_poison_the_evaluation() -> None:
    layer = renorm.BatchRenorm1d(3, momentum=0.5)
    for scale in (1.0, 1e38, 1.0):
        layer(torch.randn(8, 3) * scale * (10 if scale > 1 else 1))
    assert layer.eval()(torch.randn(4, 3)).isfinite().all()


@settings
def test_nothing_reads_a_value_from_the_device(options: dict[str, Any]) -> None:
    """Fake tensors have no values: whatever asks for one fails here, and would make a GPU wait."""
    with FakeTensorMode():
        layer = renorm.Norm(4, **options)
        x = torch.randn(6, 4, 5, requires_grad=True)
        mask = torch.ones(6, 5, dtype=torch.bool)
        for arguments in ((x,), (x, mask), (x, mask, x), (x[:0],)):
            layer(*arguments).sum().backward()
        layer.eval()
        for alpha in (0.0, 0.5):
            layer.example_weight = alpha
            layer(x, mask)
            assert layer(x).shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@settings
def test_no_step_synchronizes_with_the_gpu(options: dict[str, Any]) -> None:
    layer = renorm.Norm(4, **options).cuda()
    x = torch.randn(6, 4, 5, device="cuda", requires_grad=True)
    mask = torch.rand(6, 5, device="cuda") < 0.7
    layer(x, mask).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for training in (True, False):
            layer.train(training)
            layer(x).sum().backward()
            layer(x, mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


EMPTY_SHAPES = [(0, 4), (0, 4, 5), (0, 4, 3, 3), (0, 4, 2, 2, 2), (3, 4, 0), (2, 4, 0, 3)]


@settings
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_empty_batch_passes_through_with_zero_gradients(
    options: dict[str, Any], shape: tuple[int, ...], training: bool
) -> None:
    layer = renorm.Norm(4, **options).train(training)
    layer.example_weight = 0.3
    before = state(layer)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(4))
    assert torch.equal(layer.bias.grad, torch.zeros(4))
    for name, tensor in state(layer).items():
        assert torch.equal(tensor, before[name]), name
    assert layer.num_batches_skipped == 0


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_an_empty_batch_keeps_its_dtype_mask_and_residual(training: bool, dtype: torch.dtype) -> None:
    layer = renorm.BatchRenorm1d(4, act="relu").train(training)
    x = torch.randn(0, 4, 5, dtype=dtype)
    y = layer(x, torch.ones(0, 5, dtype=torch.bool), residual=x)
    assert y.dtype == dtype
    assert y.shape == (0, 4, 5)


LIMITED = [(3.0, 5.0), (1.0, 0.0), (1.5, 0.1)]


@pytest.mark.parametrize("limits", LIMITED, ids=str)
@pytest.mark.parametrize(("shape", "n"), [((1, 3), None), ((1, 3, 1, 1), None), ((4, 3), 1), ((4, 3, 1), 1)], ids=str)
def test_a_single_element_with_limits_gives_bias_plus_weight_times_d(
    limits: tuple[float, float], shape: tuple[int, ...], n: int | None
) -> None:
    layer = renorm.BatchRenorm(3, limits=renorm.Limits.constant(*limits), examples_per_group=n)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    layer.running_mean.copy_(torch.tensor([0.0, 1.0, -10.0]))
    layer.running_var.copy_(torch.tensor([1.0, 4.0, 0.25]))
    oracle = Oracle(
        3, momentum=0.01, tracking="std", limits=Ramps(*limits), examples_per_group=n,
        weight=layer.weight.detach().double(), bias=layer.bias.detach().double(),
    )  # fmt: skip
    oracle.mean, oracle.var = layer.running_mean.double(), layer.running_var.double()
    running_mean, running_sigma = layer.running_mean.clone(), (layer.running_var + 1e-5).sqrt()
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    flat = x.detach().flatten(1)
    d = ((flat - running_mean) / running_sigma).clamp(-limits[1], limits[1])
    torch.testing.assert_close(y.flatten(1), layer.bias + layer.weight * d)
    assert_agrees(y, oracle.train(x.detach()))
    y.square().sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    torch.testing.assert_close(layer.weight.grad, (2 * y.flatten(1) * d).sum(0).detach())


@pytest.mark.parametrize("tracking", ["std", "var"])
def test_single_elements_leave_the_running_variance_and_move_the_mean(tracking: Any) -> None:
    layer = renorm.BatchRenorm1d(3, momentum=0.5, tracking=tracking, limits=renorm.Limits.constant())
    x = torch.randn(1, 3)
    layer(x)
    assert torch.equal(layer.running_var, torch.ones(3))
    torch.testing.assert_close(layer.running_mean, x[0] / 2)
    assert layer.num_batches_tracked == 1


def test_single_elements_move_the_total_variance() -> None:
    layer = renorm.BatchRenorm1d(1, momentum=0.5, tracking="total", limits=renorm.Limits.constant())
    layer(torch.tensor([[4.0]]))
    assert layer.running_mean.item() == pytest.approx(2.0)
    assert layer.running_var.item() == pytest.approx(0.5 * 1 + 0.25 * 16)  # (1-m) V + m(1-m) (x - mu)^2


def test_single_elements_are_allowed_before_the_ramp_begins() -> None:
    layer = renorm.BatchRenorm1d(3)
    layer.bias.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(layer(torch.randn(1, 3)), torch.tensor([[1.0, 2.0, 3.0]]))  # d_max = 0


def test_training_on_batches_of_one_moves_towards_the_data() -> None:
    layer = renorm.BatchRenorm1d(2, momentum=0.05, tracking="total", limits=renorm.Limits.constant(3.0, 5.0))
    for _ in range(300):
        layer(torch.randn(1, 2) * 3 + 7)
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 7.0), rtol=0.2, atol=0.0)
    torch.testing.assert_close(layer.running_var, torch.full((2,), 9.0), rtol=0.6, atol=0.0)
