"""How the running statistics move, against the definitions of what they average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm
from renorm import Moments
from renorm.functional import update_running

pytestmark = pytest.mark.usefixtures("each_backend")

TRACKING = ("std", "var", "total")


def batches(count: int = 12) -> list[Tensor]:
    return [torch.randn(16, 3, 4, dtype=torch.float64) * (1 + i / 4) + i for i in range(count)]


def test_var_is_batch_norm_s_own_rule() -> None:
    layer, plain = renorm.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    for x in batches():
        layer(x), plain(x)
    for actual, expected in zip(layer.buffers(), plain.buffers(), strict=False):
        torch.testing.assert_close(actual, expected)


def test_var_with_a_cumulative_average_is_batch_norm_s_too() -> None:
    layer, plain = renorm.BatchNorm1d(3, momentum=None).double(), nn.BatchNorm1d(3, momentum=None).double()
    for x in batches():
        layer(x), plain(x)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean((0, 2)) for x in batches_of(layer)]).mean(0))


def batches_of(layer: renorm.Norm) -> list[Tensor]:
    torch.manual_seed(0)
    return batches(int(layer.num_batches_tracked))


def test_std_is_the_moving_average_of_the_standard_deviation() -> None:
    layer = renorm.BatchRenorm1d(3, momentum=0.1, eps=1e-3).double()
    sigma = torch.ones(3, dtype=torch.float64).add(1e-3).sqrt()
    for x in batches():
        layer(x)
        sigma = 0.9 * sigma + 0.1 * (x.var((0, 2), correction=0) + 1e-3).sqrt()
    torch.testing.assert_close((layer.running_var + 1e-3).sqrt(), sigma)


def test_std_averages_over_groups_by_their_counts() -> None:
    layer = renorm.BatchRenorm1d(3, momentum=1.0, eps=1e-3, examples_per_group=6).double()
    x = batches(1)[0]
    layer(x)
    sizes = (6, 6, 4)
    sigmas = [(chunk.var((0, 2), correction=0) + 1e-3).sqrt() for chunk in x.split(sizes)]
    expected = sum(n / 16 * sigma for n, sigma in zip(sizes, sigmas, strict=True))
    torch.testing.assert_close((layer.running_var + 1e-3).sqrt(), expected)


def test_total_is_the_moving_second_moment_less_the_squared_moving_mean() -> None:
    layer = renorm.GhostBatchNorm1d(3, 5, momentum=0.1).double()
    first, second = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for x in batches():
        layer(x)
        first = 0.9 * first + 0.1 * x.mean((0, 2))
        second = 0.9 * second + 0.1 * x.square().mean((0, 2))
    torch.testing.assert_close(layer.running_mean, first)
    torch.testing.assert_close(layer.running_var, second - first.square())


def test_total_sees_the_variance_between_batches_and_var_does_not() -> None:
    variances = {}
    for tracking in ("var", "total"):
        torch.manual_seed(0)
        layer = renorm.BatchNorm1d(1, momentum=0.02, tracking=tracking)
        for i in range(400):
            layer(torch.randn(64, 1) + (3.0 if i % 2 else -3.0))
        variances[tracking] = layer.running_var.item()
    assert variances["var"] == pytest.approx(1.0, rel=0.1)
    assert variances["total"] == pytest.approx(10.0, rel=0.1)


@pytest.mark.parametrize("tracking", TRACKING)
@pytest.mark.parametrize("n", [1, 3, 4, 16])
def test_the_running_mean_is_of_the_whole_batch_whatever_the_groups(tracking: Any, n: int) -> None:
    x = batches(1)[0]
    layer = renorm.BatchNorm1d(3, momentum=0.25, tracking=tracking, examples_per_group=n).double()
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.25 * x.mean((0, 2)))


@pytest.mark.parametrize("tracking", ["var", "total"])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("channels_per_group", [1, 3])
def test_var_and_total_do_not_depend_on_the_grouping(tracking: Any, n: int, channels_per_group: int) -> None:
    grouped = renorm.Norm(3, tracking=tracking, examples_per_group=n, channels_per_group=channels_per_group).double()
    whole = renorm.Norm(3, tracking=tracking).double()
    for x in batches(3):
        grouped(x), whole(x)
    torch.testing.assert_close(grouped.running_var, whole.running_var)


@pytest.mark.parametrize("tracking", TRACKING)
def test_statistics_are_per_channel_also_where_channels_share_groups(tracking: Any) -> None:
    layer = renorm.Norm(4, momentum=1.0, tracking=tracking, channels_per_group=2)
    x = torch.randn(64, 4, 8) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    layer(x)
    torch.testing.assert_close(layer.running_var, x.var((0, 2)), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("tracking", TRACKING)
def test_a_variance_never_becomes_negative(tracking: Any) -> None:
    layer = renorm.BatchNorm1d(2, momentum=0.5, tracking=tracking)
    for _ in range(60):
        layer(torch.full((4, 2), 123.456))
    assert (layer.running_var >= -1e-12).all()
    assert layer.eval()(torch.full((4, 2), 123.456)).isfinite().all()


@pytest.mark.parametrize("tracking", TRACKING)
def test_momentum_zero_keeps_the_statistics_and_the_step(tracking: Any) -> None:
    layer = renorm.BatchNorm1d(3, momentum=0.0, tracking=tracking)
    layer(torch.randn(8, 3))
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("tracking", TRACKING)
@pytest.mark.parametrize("momentum", [0.01, 0.5, 1.0])
def test_the_function_moves_statistics_as_the_layer_does(tracking: Any, momentum: float) -> None:
    layer = renorm.BatchNorm1d(3, momentum=momentum, tracking=tracking)
    x = torch.randn(8, 3) * 2 + 1
    layer(x)
    batch = Moments(x.mean(0)[None], x.var(0, correction=0)[None], torch.full((1, 1), 8.0))
    for given_momentum in (momentum, torch.tensor(momentum)):
        mean, var = update_running(torch.zeros(3), torch.ones(3), batch, momentum=given_momentum, tracking=tracking)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, var)


def test_the_function_leaves_its_arguments_alone() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    batch = Moments(torch.ones(1, 3), torch.ones(1, 3), torch.full((1, 1), 8.0))
    update_running(mean, var, batch, momentum=0.5, tracking="std")
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_and_frozen_training_move_nothing(training: bool) -> None:
    layer = renorm.BatchRenorm1d(3).eval()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.set_grad_enabled(training):
        layer(torch.randn(8, 3))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
