"""The faults of other implementations, each as a test that fails on them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import renorm
from renorm import functional

CONSTANT = renorm.Limits.constant


def test_eps_is_added_to_the_variance_not_to_the_standard_deviation() -> None:
    x = torch.tensor([[1e-3], [-1e-3]])
    layer = renorm.BatchRenorm1d(1, eps=1e-3, limits=CONSTANT(), affine=False)
    layer.running_var.fill_(1e-6)
    expected = 1e-3 / math.sqrt(1e-6 + 1e-3)  # with eps added to sigma it would be 0.5
    torch.testing.assert_close(layer(x), torch.tensor([[expected], [-expected]]))
    layer.running_var.fill_(1e-6)
    torch.testing.assert_close(layer.eval()(x), torch.tensor([[expected], [-expected]]))


def test_eps_enters_once_not_again_with_r() -> None:
    """CrossQ normalizes by sqrt(var / r^2 + eps), though r has eps in it: 22.4 in place of 9.53 at variance 1e-4."""
    x = torch.tensor([[1e-2], [-1e-2]], dtype=torch.float64)
    mean, var = torch.zeros(1, dtype=torch.float64), torch.full((1,), 1e-2, dtype=torch.float64)
    y, _ = functional.batch_renorm(x, mean, var, r_max=10.0, d_max=5.0, eps=1e-3)
    slope = (y[0] - y[1]) / (x[0] - x[1])
    assert slope.item() == pytest.approx(1 / math.sqrt(1e-2 + 1e-3))
    assert slope.item() == pytest.approx(9.53, abs=0.01)


def test_a_square_mask_is_not_transposed() -> None:
    x = torch.randn(2, 3, 4, 4)
    mask = torch.rand(2, 4, 4) < 0.5
    assert not torch.equal(mask, mask.mT)
    layer, transposed = renorm.BatchNorm2d(3), renorm.BatchNorm2d(3)
    y = layer(x, mask)
    assert torch.equal(y == 0, ~mask[:, None].expand_as(y))
    torch.testing.assert_close(transposed(x.mT, mask.mT).mT, y)
    expected = x.movedim(1, -1)[mask].mean(0)
    torch.testing.assert_close(layer.running_mean, 0.1 * expected)


def test_affine_false_leaves_no_parameters_behind() -> None:
    layer = renorm.BatchRenorm2d(3, affine=False)
    assert list(layer.parameters()) == []
    assert layer.weight is None
    assert layer.bias is None


def test_the_keys_of_a_checkpoint_are_those_of_batch_norm() -> None:
    assert list(renorm.BatchRenorm2d(3).state_dict()) == list(nn.BatchNorm2d(3).state_dict())


def test_statistics_live_in_buffers_and_survive_a_checkpoint() -> None:
    layer = renorm.BatchRenorm2d(3)
    layer(torch.randn(4, 3, 2, 2) + 5)
    restored = renorm.BatchRenorm2d(3)
    restored.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(restored.eval()(x), layer.eval()(x))
    assert {"running_mean", "running_var", "num_batches_tracked"} <= set(dict(layer.named_buffers()))


def test_the_ramp_survives_a_checkpoint() -> None:
    layer = renorm.BatchRenorm1d(3)
    layer.num_batches_tracked.fill_(20_000)
    restored = renorm.BatchRenorm1d(3)
    restored.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3) * 5 + 3
    plain, _ = functional.batch_norm(x)
    assert torch.equal(restored(x), layer(x))
    assert not torch.allclose(restored.eval()(x), plain)


@pytest.mark.parametrize("family", [renorm.BatchNorm1d, renorm.BatchRenorm1d], ids=lambda f: f.__name__)
def test_a_fresh_model_evaluates_finitely(family: Any) -> None:
    layer = family(3).eval()
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x), x / math.sqrt(1 + 1e-5))


def test_r_is_capped_at_r_max_from_both_sides_all_through_the_ramp() -> None:
    """torchrl's r reaches 13 with r_max = 3."""
    limits = renorm.Limits(3.0, 5.0, start=10, r_end=110, d_end=60)
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    for step in (0, 10, 11, 60, 100, 110, 111, 10**6):
        r_max, _ = limits(torch.tensor(step), torch.float64)
        assert 1.0 <= r_max <= 3.0
        for running_var, r in ((1e-6, float(r_max)), (1e6, 1 / float(r_max))):
            layer = renorm.BatchRenorm1d(1, limits=limits, affine=False).double()
            layer.num_batches_tracked.fill_(step)
            layer.running_var.fill_(running_var)
            assert layer(x).max().item() == pytest.approx(r / math.sqrt(1 + 1e-5))


def test_d_is_capped_at_d_max_from_both_sides() -> None:
    for shift, d in ((1e3, 5.0), (-1e3, -5.0), (2.0, 2.0 / math.sqrt(1 + 1e-5))):
        layer = renorm.BatchRenorm1d(1, limits=CONSTANT(3.0, 5.0), affine=False)
        y = layer(torch.tensor([[-1.0], [1.0]]) + shift)
        assert y.mean().item() == pytest.approx(d, rel=1e-4)


def test_limits_do_not_overshoot() -> None:
    limits = renorm.Limits(3.0, 5.0, start=100, r_end=400, d_end=250)
    for step in range(0, 1000, 7):
        r_max, d_max = limits(torch.tensor(step), torch.float64)
        assert 1.0 <= r_max <= 3.0
        assert 0.0 <= d_max <= 5.0


def test_the_variance_is_corrected_by_all_elements_not_by_examples() -> None:
    """With N in place of N * H * W a single image has no variance at all."""
    x = torch.randn(1, 3, 8, 8)
    layer, plain = renorm.BatchNorm2d(3), nn.BatchNorm2d(3)
    layer(x), plain(x)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.running_var.isfinite().all()
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))


def test_half_precision_keeps_finite_statistics() -> None:
    layer = renorm.BatchRenorm1d(3, limits=CONSTANT()).half()
    for _ in range(5):
        layer(torch.randn(16, 3).half() * 1_000 + 30_000)
    assert layer.running_var.isfinite().all()
    assert layer.num_batches_skipped == 0


def test_a_batch_of_one_is_no_nan() -> None:
    layer = renorm.BatchRenorm1d(3, limits=CONSTANT(), momentum=0.5)
    for _ in range(3):
        y = layer(torch.randn(1, 3))
        assert y.isfinite().all()
    assert layer.running_var.isfinite().all()


def test_limits_really_move_and_are_not_taken_once() -> None:
    """keras-contrib's ramp was evaluated once, and was batch norm for months."""
    layer = renorm.BatchRenorm1d(1, limits=renorm.Limits(3.0, 5.0, start=1, r_end=9, d_end=9), affine=False)
    shifts = []
    for _ in range(11):
        layer.running_mean.zero_()
        layer.running_var.fill_(1)
        shifts.append(layer(torch.tensor([[99.0], [101.0]])).mean().item())
    expected = [0.0, 0.0, *(5 * step / 8 for step in range(1, 9)), 5.0]
    assert shifts == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("num_groups", [2, 8, 32])
def test_one_batch_is_one_update_whatever_its_ghost_groups(num_groups: int) -> None:
    """A loop over chunks makes of momentum 0.02 one of 0.149 at 8 chunks."""
    x = torch.randn(64, 3) + 10
    layer = renorm.GhostBatchNorm1d(3, 64 // num_groups, momentum=0.02)
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.02 * x.mean(0))
    assert layer.num_batches_tracked == 1


def test_a_last_ghost_group_of_one_example_does_not_raise() -> None:
    layer = renorm.GhostBatchNorm1d(3, 4)
    x = torch.randn(9, 3)
    y = layer(x)
    torch.testing.assert_close(y[4:], functional.batch_norm(x[4:])[0])


def test_ghost_groups_are_contiguous_not_strided() -> None:
    x = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
    y = renorm.GhostBatchNorm1d(1, 2, eps=0.0)(x)
    torch.testing.assert_close(y, torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]))


def test_ghost_batches_are_not_applied_at_evaluation() -> None:
    layer = renorm.GhostBatchNorm1d(3, 2)
    layer(torch.randn(8, 3))
    layer.eval()
    x = torch.randn(6, 3)
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


def test_the_variance_between_ghost_batches_is_not_lost() -> None:
    """The mean of ghost variances falls short by exactly the variance of the group means."""
    x = torch.cat([torch.full((8, 1), float(g)) + torch.randn(8, 1) * 0.1 for g in range(4)])
    for tracking, correction in (("var", 1), ("total", 0)):
        layer = renorm.GhostBatchNorm1d(1, 8, momentum=1.0, tracking=tracking)
        layer(x)
        torch.testing.assert_close(layer.running_var, x.var(0, correction=correction))


def test_small_batches_are_allowed_at_evaluation() -> None:
    assert renorm.GhostBatchNorm1d(3, 16).eval()(torch.randn(1, 3)).shape == (1, 3)


def test_checkpointing_the_activations_keeps_the_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, twin = renorm.BatchNorm1d(3), renorm.BatchNorm1d(3)
    x = torch.randn(6, 3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    (expected,) = torch.autograd.grad(twin(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_training_and_evaluation_agree_once_the_statistics_have_settled() -> None:
    layer = renorm.BatchRenorm1d(3, limits=CONSTANT(), momentum=0.1, examples_per_group=2)
    for _ in range(100):
        layer(torch.randn(16, 3) * 2 + 1)
    x = torch.randn(16, 3) * 2 + 1
    evaluated = layer.eval()(x)
    trained = layer.train()(x)
    plain, _ = functional.batch_norm(x, examples_per_group=2)
    assert (trained - evaluated).abs().mean() < 0.5 * (plain - evaluated).abs().mean()


def test_the_gradient_goes_through_the_batch_statistics() -> None:
    """Normalizing by constants, with no gradient through the moments, destabilizes training."""
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    layer = renorm.BatchRenorm1d(3, limits=CONSTANT()).double()
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    assert dx.abs().max() < 1e-12


def test_running_statistics_are_taken_from_before_the_batch() -> None:
    layer = renorm.BatchRenorm1d(1, momentum=1.0, limits=CONSTANT(math.inf, math.inf), affine=False, eps=0.0)
    x = torch.tensor([[8.0], [12.0]])
    torch.testing.assert_close(layer(x), x)  # mean 0, variance 1: not those of this batch
    torch.testing.assert_close(layer(x), (x - 10) / 2)
