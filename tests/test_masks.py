"""Masks: what is padded touches nothing, whatever it holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import Oracle, assert_agrees
from torch import Tensor

import renorm
from renorm import functional

pytestmark = pytest.mark.usefixtures("each_backend")

JUNK = (math.nan, math.inf, -math.inf, 1e38)

SETTINGS: dict[str, dict[str, Any]] = {
    "batch norm": {},
    "renorm": {"limits": renorm.Limits.constant(), "tracking": "std"},
    "renorm, var": {"limits": renorm.Limits.constant(1.5, 0.5)},
    "ghost": {"examples_per_group": 2, "tracking": "total"},
    "ghost, smaller last group": {"examples_per_group": 4, "tracking": "std"},
    "batch-group renorm": {"examples_per_group": 2, "channels_per_group": 2, "limits": renorm.Limits.constant()},
    "half of each example": {"example_weight": 0.5},
    "each example alone": {"example_weight": 1.0, "channels_per_group": 2},
}
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
lengths = torch.tensor([5, 2, 0, 7, 1, 3])


def padded_batch(junk: float) -> tuple[Tensor, Tensor]:
    mask = torch.arange(7) < lengths[:, None]
    x = torch.randn(6, 4, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1
    return torch.where(mask[:, None], x, junk), mask


def outcome(x: Tensor, mask: Tensor | None, options: dict[str, Any], training: bool, **more: Tensor) -> list[Tensor]:
    """Output, gradients and statistics of one call."""
    layer = renorm.Norm(4, **options).train(training)
    layer.running_mean.fill_(0.5)
    x = x.detach().requires_grad_()
    y = layer(x, mask, **more)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    return [y.detach(), *gradients, layer.running_mean, layer.running_var, layer.num_batches_tracked]


@settings
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("junk", JUNK)
def test_what_is_padded_touches_neither_outputs_nor_statistics_nor_gradients(
    options: dict[str, Any], training: bool, junk: float
) -> None:
    clean, mask = padded_batch(0.0)
    dirty, _ = padded_batch(junk)
    for actual, expected in zip(
        outcome(dirty, mask, options, training), outcome(clean, mask, options, training), strict=True
    ):
        assert torch.equal(actual, expected)
        assert actual.isfinite().all()


@settings
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_output_and_input_gradient_are_zero_where_masked(options: dict[str, Any], training: bool) -> None:
    x, mask = padded_batch(math.nan)
    y, dx, *_ = outcome(x, mask, options, training)
    outside = ~mask[:, None].expand_as(x)
    assert (y[outside] == 0).all()
    assert (dx[outside] == 0).all()
    assert (y[~outside] != 0).any()


@pytest.mark.parametrize("limits", [None, renorm.Limits.constant(1.5, 0.5)], ids=["batch norm", "renorm"])
@pytest.mark.parametrize("tracking", ["std", "var", "total"])
@pytest.mark.parametrize("channels_per_group", [1, 2])
def test_padded_sequences_are_the_sequences_without_padding(
    limits: renorm.Limits | None, tracking: Any, channels_per_group: int
) -> None:
    sequences = [torch.randn(4, int(length)) * 2 + 1 for length in lengths]
    x = torch.nn.utils.rnn.pad_sequence([s.T for s in sequences], batch_first=True, padding_value=math.nan)
    mask = torch.arange(7) < lengths[:, None]
    padded = renorm.Norm(4, limits=limits, tracking=tracking, channels_per_group=channels_per_group)
    joined = renorm.Norm(4, limits=limits, tracking=tracking, channels_per_group=channels_per_group)
    y = padded(x.transpose(1, 2), mask)
    expected = joined(torch.cat(sequences, dim=1)[None])[0].split(lengths.tolist(), dim=1)
    for i, sequence in enumerate(expected):
        torch.testing.assert_close(y[i, :, : lengths[i]], sequence)
    torch.testing.assert_close(padded.running_mean, joined.running_mean)
    torch.testing.assert_close(padded.running_var, joined.running_var)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("channels_per_group", [1, 2])
def test_a_padded_sequence_evaluates_as_the_sequence_alone(alpha: float, channels_per_group: int) -> None:
    layer = renorm.BatchNorm1d(4, example_weight=alpha, channels_per_group=channels_per_group)
    layer(torch.randn(8, 4, 5) * 2 - 1)
    layer.eval()
    x, mask = padded_batch(math.nan)
    y = layer(x, mask)
    for i, length in enumerate(lengths.tolist()):
        if length:
            torch.testing.assert_close(y[i : i + 1, :, :length], layer(x[i : i + 1, :, :length]))


def test_a_mask_for_images_is_not_transposed_when_height_is_width() -> None:
    x = torch.zeros(2, 1, 3, 3)
    x[:, :, 0] = torch.tensor([1.0, 2.0, 3.0])  # the first row counts, the first column would be 1, 0, 0
    mask = torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[:, 0] = True
    layer = renorm.BatchNorm2d(1, momentum=1.0)
    y = layer(x, mask)
    assert layer.running_mean.item() == pytest.approx(2.0)
    assert torch.equal(y != 0, (mask & (x[:, 0] != 2.0)).unsqueeze(1))


def test_a_mask_for_square_volumes_keeps_its_axes() -> None:
    x = torch.arange(27.0).view(1, 1, 3, 3, 3)
    for axis in range(3):
        mask = torch.zeros(1, 3, 3, 3, dtype=torch.bool)
        mask.select(axis + 1, 2).fill_(True)
        layer = renorm.BatchNorm3d(1, momentum=1.0)
        layer(x, mask)
        assert layer.running_mean.item() == pytest.approx(float(x[0, 0].select(axis, 2).mean()))


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (5,), (4, 1), (4, 5), (1, 4, 5), (6, 1, 1), (6, 4, 1), (1, 1, 5), (6, 1, 5)],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_mask_broadcasts_to_examples_and_positions(shape: tuple[int, ...], training: bool) -> None:
    x = torch.randn(6, 3, 4, 5)
    mask = torch.rand(shape) < 0.6
    mask.view(-1)[0] = True
    layers = [renorm.BatchNorm2d(3, example_weight=0.5).train(training) for _ in range(2)]
    given, full = layers[0](x, mask), layers[1](x, mask.expand(6, 4, 5).contiguous())
    assert torch.equal(given, full)
    assert torch.equal(layers[0].running_var, layers[1].running_var)


def test_a_mask_without_positions_selects_examples() -> None:
    x = torch.randn(5, 3)
    mask = torch.tensor([True, False, True, True, False])
    layer, selected = renorm.BatchNorm1d(3), renorm.BatchNorm1d(3)
    torch.testing.assert_close(layer(x, mask)[mask], selected(x[mask]))
    torch.testing.assert_close(layer.running_var, selected.running_var)


@settings
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_mask_of_all_elements_is_no_mask(options: dict[str, Any], training: bool) -> None:
    x = torch.randn(6, 4, 7)
    everywhere = torch.ones(6, 7, dtype=torch.bool)
    for actual, expected in zip(
        outcome(x, everywhere, options, training), outcome(x, None, options, training), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@settings
def test_a_wholly_masked_batch_changes_nothing(options: dict[str, Any]) -> None:
    layer = renorm.Norm(4, **options)
    layer(torch.randn(6, 4, 7))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.full((6, 4, 7), math.nan, requires_grad=True)
    y = layer(x, torch.zeros(6, 7, dtype=torch.bool))
    y.sum().backward()
    assert (y == 0).all()
    assert (x.grad == 0).all()
    assert (layer.weight.grad == 0).all()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert layer.num_batches_skipped == 0


@pytest.mark.parametrize("tracking", ["std", "var", "total"])
def test_a_wholly_masked_group_updates_nothing(tracking: Any) -> None:
    x = torch.randn(6, 3, 4)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[2:4] = False
    layer = renorm.GhostBatchNorm1d(3, 2, tracking=tracking)
    others = renorm.GhostBatchNorm1d(3, 2, tracking=tracking)
    y = layer(x, mask)
    without = torch.cat([x[:2], x[4:]])
    torch.testing.assert_close(torch.cat([y[:2], y[4:]]), others(without))
    torch.testing.assert_close(layer.running_mean, others.running_mean)
    torch.testing.assert_close(layer.running_var, others.running_var)


@pytest.mark.parametrize("channels_per_group", [1, 2])
def test_a_wholly_masked_example_is_evaluated_with_weight_zero(channels_per_group: int) -> None:
    layer = renorm.BatchNorm1d(4, example_weight=0.5, channels_per_group=channels_per_group).eval()
    x = torch.randn(3, 4, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    y = layer(x.requires_grad_(), mask)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (y[1] == 0).all()
    assert (dx[1] == 0).all()
    assert torch.equal(y[0], layer(x)[0])


def test_groups_go_by_the_index_of_the_example_whatever_the_mask() -> None:
    x = torch.randn(4, 2, 3)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1] = False
    y, moments = functional.batch_norm(x, mask=mask, examples_per_group=2)
    assert moments.count.flatten().tolist() == [3, 6]
    torch.testing.assert_close(y[:1], functional.batch_norm(x[:1])[0])


@pytest.mark.parametrize("options", [{}, {"limits": renorm.Limits.constant()}], ids=["batch norm", "renorm"])
def test_a_group_in_which_a_single_element_counts_is_finite(options: dict[str, Any]) -> None:
    layer = renorm.BatchNorm1d(2, tracking="std", examples_per_group=2, **options)
    x = torch.randn(4, 2, 3, requires_grad=True)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[:2] = False
    mask[0, 1] = True
    oracle = Oracle(2, tracking="std", examples_per_group=2)
    y = layer(x, mask)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (dx[:2] == 0).all()
    assert y.isfinite().all()
    if not options:
        assert_agrees(y, oracle.train(x.detach(), mask))
        assert_agrees(layer.running_var, oracle.var)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_residual_is_masked_too(training: bool) -> None:
    x, mask = padded_batch(math.nan)
    residual = torch.where(mask[:, None], torch.ones_like(x), math.nan).requires_grad_()
    layer = renorm.BatchNorm1d(4, act="gelu").train(training)
    y = layer(x, mask, residual)
    (gradient,) = torch.autograd.grad(y.sum(), residual)
    outside = ~mask[:, None].expand_as(x)
    assert (y[outside] == 0).all()
    assert (gradient[outside] == 0).all()
    torch.testing.assert_close(
        y[~outside], torch.nn.functional.gelu(renorm.BatchNorm1d(4).train(training)(x, mask) + 1)[~outside]
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_masks_and_half_precision_go_together(training: bool) -> None:
    x, mask = padded_batch(math.nan)
    layer = renorm.BatchNorm1d(4, example_weight=0.3).train(training)
    y = layer(x.half(), mask)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), layer(x, mask), rtol=2e-3, atol=2e-3)


def test_gradients_of_gradients_do_not_see_what_is_padded() -> None:
    x, mask = padded_batch(math.nan)
    x = x.double().requires_grad_()
    y, _ = functional.batch_norm(x, mask=mask)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    assert second.isfinite().all()
    assert (second[~mask[:, None].expand_as(x)] == 0).all()
