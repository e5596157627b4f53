"""Half precision, double precision and autocast: statistics in float32 at least, output in the input's dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import renorm

pytestmark = pytest.mark.usefixtures("each_backend")

HALVES = (torch.float16, torch.bfloat16)
SETTINGS: dict[str, dict[str, Any]] = {
    "batch norm": {},
    "renorm": {"limits": renorm.Limits.constant()},
    "ghost": {"examples_per_group": 3},
    "batch-group": {"examples_per_group": 2, "channels_per_group": 2},
    "example weight": {"example_weight": 0.4},
}
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@settings
@halves
@modes
@pytest.mark.parametrize("layer_dtype", [torch.float32, None], ids=["float32 layer", "half layer"])
def test_half_precision_input_is_normalized_as_float32_would_be(
    options: dict[str, Any], dtype: torch.dtype, training: bool, layer_dtype: torch.dtype | None
) -> None:
    exact = renorm.Norm(4, momentum=0.5, **options)
    layer = renorm.Norm(4, momentum=0.5, **options).to(layer_dtype or dtype)
    x = (torch.randn(8, 4, 6) * 3 + 2).to(dtype).requires_grad_()
    exact_x = x.detach().float().requires_grad_()
    exact(exact_x), layer(x)
    y, exact_y = layer.train(training)(x), exact.train(training)(exact_x)
    assert y.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), exact_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer.running_mean, exact.running_mean)
    torch.testing.assert_close(layer.running_var, exact.running_var)
    dy = torch.randn(x.shape).to(dtype)
    gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    exact_gradients = torch.autograd.grad(exact_y, [exact_x, exact.weight, exact.bias], dy.float())
    for gradient, leaf, expected in zip(gradients, [x, layer.weight, layer.bias], exact_gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        size = float(expected.abs().max())
        torch.testing.assert_close(gradient.float(), expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16], ids=["half", "bfloat16"])
def test_casting_leaves_running_statistics_and_step_as_they_are(cast: Any) -> None:
    layer = renorm.BatchRenorm2d(4, limits=renorm.Limits.constant())
    layer(torch.randn(5, 4, 3, 3) * 1e3 + 12_345.678)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    cast(layer)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name]), name
    assert layer.weight.dtype == layer.bias.dtype != torch.float32


def test_casting_works_inside_a_model_and_by_to() -> None:
    model = nn.Sequential(nn.Linear(4, 4), renorm.BatchRenorm1d(4)).to(torch.bfloat16)
    assert model[1].running_var.dtype == torch.float32
    assert model[1].weight.dtype == model[0].weight.dtype == torch.bfloat16
    model.to("meta", torch.float16)
    assert model[1].running_var.dtype == torch.float32
    assert model[1].running_var.is_meta


def test_double_is_double_all_through_and_back() -> None:
    layer = renorm.BatchRenorm2d(4).double()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    assert layer(x).dtype == torch.float64
    assert layer.running_mean.dtype == layer.running_var.dtype == layer.weight.dtype == torch.float64
    assert layer.num_batches_tracked.dtype == torch.int64
    assert layer.float().running_var.dtype == torch.float32
    assert layer.double().half().running_var.dtype == torch.float32


@settings
@modes
def test_double_input_through_a_float32_layer(options: dict[str, Any], training: bool) -> None:
    layer = renorm.Norm(4, **options).train(training)
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.float64
    y.sum().backward()
    assert x.grad.dtype == torch.float64
    assert layer.weight.grad.dtype == torch.float32
    assert layer.running_var.dtype == torch.float32


@settings
@modes
def test_float32_input_through_a_double_layer(options: dict[str, Any], training: bool) -> None:
    layer = renorm.Norm(4, **options).double().train(training)
    x = torch.randn(6, 4, 5, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, renorm.Norm(4, **options).train(training)(x))
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float64


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_the_dtype_argument_is_of_the_parameters(dtype: torch.dtype) -> None:
    layer = renorm.GhostBatchNorm2d(4, 2, dtype=dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.running_mean.dtype == torch.promote_types(dtype, torch.float32)
    assert layer(torch.randn(4, 4, 2, 2, dtype=dtype)).dtype == dtype


def test_the_default_dtype_is_respected() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        layer = renorm.BatchNorm1d(3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.dtype == layer.running_var.dtype == torch.float64


@settings
def test_large_float16_values_do_not_overflow_the_statistics(options: dict[str, Any]) -> None:
    layer = renorm.Norm(4, momentum=1.0, **options)
    x = torch.randn(32, 4, 64).mul_(15_000).clamp_(-65_000, 65_000).half()
    y = layer(x)
    assert layer.num_batches_skipped == 0
    exact = x.double()
    torch.testing.assert_close(layer.running_var.double(), exact.var((0, 2)), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(layer.running_mean.double(), exact.mean((0, 2)), rtol=1e-3, atol=1.0)
    assert y.isfinite().all()
    assert layer.eval()(x).isfinite().all()


def test_many_float16_values_do_not_overflow_their_sum() -> None:
    layer = renorm.BatchNorm2d(2, momentum=1.0)
    layer(torch.full((4, 2, 64, 64), 1_000.0).half())
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 1_000.0))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("family", [renorm.BatchNorm2d, renorm.BatchRenorm2d], ids=lambda f: f.__name__)
@modes
def test_autocast_gives_the_norm_half_precision_and_keeps_its_statistics(family: Any, training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), family(4), nn.ReLU()).train(training)
    x = torch.randn(6, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert model[1].running_mean.dtype == torch.float32
    y.float().square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    twin = nn.Sequential(nn.Conv2d(3, 4, 3), family(4), nn.ReLU()).train(training)
    twin[0].load_state_dict(model[0].state_dict())
    torch.testing.assert_close(y.float(), twin(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_half_precision_checkpoint_loads_into_float32_statistics(assign: bool) -> None:
    state = nn.BatchNorm2d(4).half().state_dict()
    layer = renorm.BatchRenorm2d(4)
    layer.load_state_dict(state, assign=assign)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert layer.weight.dtype == (torch.float16 if assign else torch.float32)


def test_a_double_checkpoint_assigned_stays_double() -> None:
    layer = renorm.BatchRenorm2d(4)
    layer.load_state_dict(nn.BatchNorm2d(4).double().state_dict(), assign=True)
    assert layer.running_mean.dtype == torch.float64
    assert layer(torch.randn(3, 4, 2, 2, dtype=torch.float64)).dtype == torch.float64


@modes
@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(("dtype", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_a_residual_of_another_dtype_is_cast_to_the_input_s(
    dtype: torch.dtype, other: torch.dtype, training: bool
) -> None:
    layer, x = renorm.BatchNorm1d(3, act="relu").train(training), torch.randn(4, 3).to(dtype)
    residuals = [residual.requires_grad_() for residual in (torch.randn(4, 3).to(other),) * 2]
    y = layer(x, residual=residuals[0])
    expected = layer(x, residual=residuals[1].to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    (found,), (wanted,) = (torch.autograd.grad(z.sum(), r) for z, r in zip((y, expected), residuals, strict=True))
    assert found.dtype == other
    assert torch.equal(found, wanted)
