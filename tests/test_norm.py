"""The layer around the mathematics: evaluation bit for bit, activation, residual, no running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import renorm

SHAPES = {
    "BatchNorm1d": [(5, 6), (5, 6, 7)],
    "BatchNorm2d": [(5, 6, 7, 3), (1, 6, 1, 1)],
    "BatchNorm3d": [(2, 6, 3, 2, 4)],
}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]


def trained_pair(name: str, family: str = "BatchNorm", **options: Any) -> tuple[renorm.Norm, nn.Module]:
    plain = getattr(nn, name)(6)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    plain.running_mean.normal_()
    plain.running_var.uniform_(0.1, 2.0)
    layer = getattr(renorm, name.replace("BatchNorm", family))(6, **options)
    layer.load_state_dict(plain.state_dict())
    return layer.eval(), plain.eval()


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
@pytest.mark.parametrize("family", ["BatchNorm", "BatchRenorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_evaluation_is_bit_equal_to_batch_norm(
    name: str, shape: tuple[int, ...], family: str, dtype: torch.dtype
) -> None:
    layer, plain = trained_pair(name, family)
    layer, plain = layer.to(dtype), plain.to(dtype)
    x = (torch.randn(shape, dtype=dtype) * 3).requires_grad_()
    y, expected = layer(x), plain(x)
    assert torch.equal(y, expected)
    dy = torch.randn_like(x)
    actual = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    for gradient, exact in zip(actual, torch.autograd.grad(expected, [x, plain.weight, plain.bias], dy), strict=True):
        assert torch.equal(gradient, exact)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_evaluation_is_bit_equal_in_channels_last_and_without_parameters(options: dict[str, Any]) -> None:
    layer, plain = renorm.BatchRenorm2d(6, **options), nn.BatchNorm2d(6, affine=options.get("affine", True))
    if layer.bias is None:
        plain.bias = None  # an older torch has no argument for it
    plain.running_mean.normal_()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(5, 6, 7, 3).to(memory_format=torch.channels_last)
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_evaluation_is_bit_equal_for_ghost_batches_too() -> None:
    _, plain = trained_pair("BatchNorm2d")
    ghost = renorm.GhostBatchNorm2d(6, 2)
    ghost.load_state_dict(plain.state_dict())
    x = torch.randn(5, 6, 7, 3)
    assert torch.equal(ghost.eval()(x), plain(x))


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if case[1][0] > 1], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_trains_as_torch_s(name: str, shape: tuple[int, ...], momentum: float | None) -> None:
    layer, plain = getattr(renorm, name)(6, momentum=momentum), getattr(nn, name)(6, momentum=momentum)
    for _ in range(12):
        x = (torch.randn(shape) * 2 + 1).requires_grad_()
        y, expected = layer(x), plain(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        dy = torch.randn(shape)
        (dx,), (exact,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
        torch.testing.assert_close(dx, exact, rtol=1e-4, atol=1e-5)
    for name_, tensor in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name_], tensor)


def test_the_example_weight_can_be_set_at_any_time() -> None:
    layer, plain = trained_pair("BatchNorm2d")
    x = torch.randn(5, 6, 7, 3)
    layer.example_weight = 1.0
    torch.testing.assert_close(layer(x), F.instance_norm(x, weight=layer.weight, bias=layer.bias), rtol=1e-4, atol=1e-5)
    layer.example_weight = 0
    assert torch.equal(layer(x), plain(x))
    assert layer.example_weight == 0.0


def test_the_example_weight_plays_no_part_in_training() -> None:
    x = torch.randn(5, 6, 4)
    assert torch.equal(renorm.BatchNorm1d(6, example_weight=0.7)(x), renorm.BatchNorm1d(6)(x))


@pytest.mark.parametrize(
    ("act", "function"),
    [("relu", F.relu), ("leaky_relu", F.leaky_relu), ("silu", F.silu), ("gelu", F.gelu), ("hardswish", F.hardswish)],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_activation_follows_norm_and_residual(act: Any, function: Any, training: bool, with_residual: bool) -> None:
    layer, bare = (renorm.BatchRenorm1d(6, act=a, limits=renorm.Limits.constant()).train(training) for a in (act, None))
    x, residual = torch.randn(2, 5, 6, 4, requires_grad=True).unbind()
    y = layer(x, residual=residual if with_residual else None)
    expected = function(bare(x) + residual if with_residual else bare(x))
    torch.testing.assert_close(y, expected)
    leaves = [x, residual] if with_residual else [x]
    for gradient, exact in zip(
        torch.autograd.grad(y.square().sum(), [*leaves, layer.weight, layer.bias]),
        torch.autograd.grad(expected.square().sum(), [*leaves, bare.weight, bare.bias]),
        strict=True,
    ):
        torch.testing.assert_close(gradient, exact)


@pytest.mark.parametrize("options", [{}, {"examples_per_group": 2}, {"channels_per_group": 2}], ids=str)
def test_without_running_statistics_evaluation_normalizes_by_the_batch(options: dict[str, Any]) -> None:
    layer = renorm.Norm(6, track_running_stats=False, **options)
    x = torch.randn(8, 6, 3)
    trained = layer(x)
    assert torch.equal(layer.eval()(x), trained)
    assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
    if not options:
        torch.testing.assert_close(trained, nn.BatchNorm1d(6, track_running_stats=False).eval()(x))


def test_without_running_statistics_masks_work() -> None:
    layer = renorm.BatchNorm1d(3, track_running_stats=False).eval()
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) < 0.6
    torch.testing.assert_close(layer(x, mask), renorm.BatchNorm1d(3)(x, mask))


def test_a_frozen_layer_gives_gradients_to_its_input_only() -> None:
    layer = renorm.BatchRenorm1d(3, limits=renorm.Limits.constant()).requires_grad_(False)
    x = torch.randn(6, 3, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_parameters_train_where_the_input_needs_no_gradient() -> None:
    layer = renorm.GhostBatchNorm1d(3, 2)
    layer(torch.randn(7, 3)).square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.bias.grad.isfinite().all()


def test_layers_without_a_dimension_take_every_dimension() -> None:
    layer = renorm.BatchRenorm(4)
    for shape in ((3, 4), (3, 4, 2), (3, 4, 2, 2), (3, 4, 2, 2, 2)):
        assert layer(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("family", ["BatchNorm", "BatchRenorm", "GhostBatchNorm", "BatchGroupNorm"])
@pytest.mark.parametrize("dimension", ["1d", "2d", "3d"])
def test_layers_with_a_dimension_are_their_family_and_a_norm(family: str, dimension: str) -> None:
    with_dimension = getattr(renorm, family + dimension)
    assert issubclass(with_dimension, getattr(renorm, family))
    assert issubclass(with_dimension, renorm.Norm)


def test_all_public_names_exist() -> None:
    for name in renorm.__all__:
        assert hasattr(renorm, name)


def test_a_small_network_learns_with_each_family() -> None:
    x = torch.randn(64, 2)
    target = (x[:, 0] * x[:, 1] > 0).long()
    for norm in (
        renorm.BatchNorm1d(16),
        renorm.BatchRenorm1d(16, momentum=0.1, limits=renorm.Limits.over(100)),
        renorm.GhostBatchNorm1d(16, 16, momentum=0.1),
        renorm.BatchGroupNorm1d(16, 4, momentum=0.1, examples_per_group=16),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 16), norm, nn.ReLU(), nn.Linear(16, 2))
        optimizer = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
        accuracy = (model.eval()(x).argmax(1) == target).float().mean()
        assert accuracy > 0.8, type(norm).__name__
