"""What people change on built layers has the effect that it has on nn.BatchNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import renorm

Change = Callable[[Any], object]


def setting(**attributes: Any) -> Change:
    def change(layer: Any) -> None:
        for name, value in attributes.items():
            setattr(layer, name, copy.deepcopy(value))

    return change


CHANGES: dict[str, Change] = {
    "eps": setting(eps=0.3),
    "momentum": setting(momentum=0.7),
    "momentum of the cumulative average": setting(momentum=None),
    "momentum of the last batch": setting(momentum=1.0),
    "no more tracking": setting(track_running_stats=False),
    "tracking again": lambda layer: [setattr(layer, "track_running_stats", tracks) for tracks in (False, True)],
    "neither statistics nor tracking": setting(track_running_stats=False, running_mean=None, running_var=None),
    "no count": setting(num_batches_tracked=None),
    "no weight": setting(weight=None),
    "no bias": setting(bias=None),
    "affine, which is a note": setting(affine=False),
    "another weight": setting(weight=nn.Parameter(torch.full((3,), 2.0))),
    "another mean": setting(running_mean=torch.full((3,), 2.0)),
    "another variance, not contiguous": setting(running_var=torch.ones(6)[::2]),
    "another count": setting(num_batches_tracked=torch.tensor(7)),
    "a count times 0": lambda layer: setattr(layer, "num_batches_tracked", layer.num_batches_tracked * 0),
    "a buffer registered again": lambda layer: layer.register_buffer("running_mean", torch.ones(3)),
    "statistics reset": lambda layer: layer.reset_running_stats(),
    "parameters reset": lambda layer: layer.reset_parameters(),
    "no gradients": lambda layer: layer.requires_grad_(False),
    "one gradient": lambda layer: layer.bias.requires_grad_(False),
    "double": lambda layer: layer.double(),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_does_what_it_does_to_nn_batchnorm(change: Change, training: bool) -> None:
    expected, found = (behaviour(cls(3), change, training) for cls in (nn.BatchNorm2d, renorm.BatchNorm2d))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def behaviour(layer: Any, change: Change, training: bool) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    for _ in range(2):
        layer(torch.randn(4, 3, 5, 5, generator=random) * 2 + 1)
    change(layer)
    layer.train(training)
    dtype = torch.get_default_dtype() if layer.weight is None else layer.weight.dtype
    x = torch.randn(4, 3, 5, 5, generator=random).to(dtype).requires_grad_()
    layer(x)
    y = layer(x)
    y.square().sum().backward()
    gradients = [p.grad for p in layer.parameters() if p.requires_grad]
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients, **layer.state_dict()}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "layer", [renorm.BatchNorm2d(3), renorm.BatchRenorm2d(3), renorm.GhostBatchNorm2d(3, 4)], ids=repr
)
def test_without_statistics_the_batch_normalizes(layer: Any, training: bool) -> None:
    setting(running_mean=None, running_var=None)(layer)
    x = torch.randn(4, 3, 5, 5)
    y = layer.train(training)(x)
    torch.testing.assert_close(y, nn.BatchNorm2d(3)(x), rtol=1e-4, atol=1e-5)


def test_without_tracking_a_batch_is_corrected_towards_what_is_there() -> None:
    layer = renorm.BatchRenorm1d(3, limits=renorm.Limits.constant(float("inf"), float("inf")))
    setting(track_running_stats=False, running_mean=torch.full((3,), 2.0))(layer)
    x = torch.randn(8, 3)
    torch.testing.assert_close(layer(x), layer.eval()(x))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("limits", [None, renorm.Limits.constant()], ids=["batch norm", "batch renorm"])
def test_a_momentum_of_0_normalizes_by_the_batch_and_moves_nothing(limits: renorm.Limits | None) -> None:
    layer = renorm.Norm(3, limits=limits)
    layer(torch.randn(8, 3))
    second = copy.deepcopy(layer)
    before = copy.deepcopy(layer.state_dict())
    second.momentum = 0.0  # as for SAM's second forward
    x = torch.randn(8, 3)
    assert torch.equal(second(x), layer(x))
    torch.testing.assert_close(second.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [None, 1.0])
def test_the_correction_rests_while_tools_take_statistics_anew(momentum: float | None) -> None:
    layer = renorm.BatchRenorm1d(3, limits=renorm.Limits.constant())
    plain = renorm.BatchNorm1d(3)
    x = torch.randn(8, 3) + 4
    assert not torch.allclose(layer(x), plain(x))
    layer.momentum = momentum
    torch.testing.assert_close(layer(x), plain(x))
    assert layer(x[:1]).shape == (1, 3), "single elements are still taken"
    layer.momentum = 0.01
    layer.running_mean.zero_()
    assert not torch.allclose(layer(x), plain(x), atol=1e-2)


def test_a_layer_constructed_with_the_cumulative_average_corrects() -> None:
    layer = renorm.BatchRenorm1d(3, momentum=None, limits=renorm.Limits.constant())
    x = torch.randn(8, 3) + 4
    assert not torch.allclose(layer(x), renorm.BatchNorm1d(3)(x))


@pytest.mark.parametrize("passing", [0.0, 1.0], ids=["as SAM", "as precise batch norm"])
def test_a_momentum_set_back_to_what_it_was_made_with_ends_the_estimate(passing: float) -> None:
    layer = renorm.BatchRenorm1d(3, momentum=None, limits=renorm.Limits.constant())
    x = torch.randn(8, 3) + 4
    layer(x)
    layer.momentum = passing
    layer.momentum = None
    assert not torch.allclose(layer(5 * x), renorm.BatchNorm1d(3)(5 * x), atol=1e-2)


class TestFrozen:
    @pytest.mark.parametrize("statistics", ["running", "batch"])
    def test_it_outlasts_train_copies_and_pickling(self, statistics: Any) -> None:
        layer = renorm.BatchRenorm1d(3)
        layer.frozen = statistics
        copied = copy.deepcopy(layer.eval().train())
        copied(torch.randn(8, 3) + 4)
        assert copied.frozen == statistics
        assert copied.num_batches_tracked == 0
        assert copied.running_mean.eq(0).all()

    def test_it_normalizes_by_what_it_says(self) -> None:
        layer = renorm.BatchNorm1d(3)
        layer(torch.randn(8, 3) * 2 + 1)
        x = torch.randn(8, 3)
        layer.frozen = "batch"
        torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x))
        layer.frozen = "running"
        torch.testing.assert_close(layer(x), copy.deepcopy(layer).eval()(x))

    def test_it_ends_with_none(self) -> None:
        layer = renorm.BatchNorm1d(3)
        layer.frozen = "running"
        layer.frozen = None
        layer(torch.randn(8, 3))
        assert layer.num_batches_tracked == 1

    def test_a_block_inside_says_what_to_normalize_by_and_ends(self) -> None:
        layer = renorm.BatchNorm1d(3)
        layer.frozen = "running"
        x = torch.randn(8, 3) + 1
        with renorm.freeze(layer, statistics="batch"):
            torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x))
        assert layer.frozen == "running"
        torch.testing.assert_close(layer(x), x, rtol=1e-4, atol=1e-4)

    def test_accumulate_moves_nothing(self) -> None:
        layer = renorm.BatchNorm1d(3)
        layer.frozen = "batch"
        with renorm.accumulate(layer):
            layer(torch.randn(8, 3))
        assert layer.num_batches_tracked == 0

    def test_another_value_is_refused(self) -> None:
        with pytest.raises(ValueError, match="frozen must be None, 'running' or 'batch', got True"):
            renorm.BatchNorm1d(3).frozen = True  # type: ignore[assignment]


def test_a_count_that_leaves_the_meta_device_starts_at_0() -> None:
    layer = renorm.BatchRenorm1d(3, device="meta")
    layer.num_batches_skipped = torch.full((), 3_000_000_000)  # as memory that nobody has written to
    assert layer.num_batches_skipped == 0
