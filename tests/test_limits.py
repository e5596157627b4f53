"""The limits r_max and d_max by step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Ramps

from renorm import BatchRenorm1d, Limits


def at(limits: Limits, step: int) -> tuple[float, float]:
    return tuple(float(limit) for limit in limits(torch.tensor(step), torch.float64))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("step", "r_max", "d_max"),
    [
        (0, 1.0, 0.0),
        (4_999, 1.0, 0.0),
        (5_000, 1.0, 0.0),
        (5_001, 1 + 2 / 35_000, 5 / 20_000),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5.0),
        (39_999, 3 - 2 / 35_000, 5.0),
        (40_000, 3.0, 5.0),
        (10**9, 3.0, 5.0),
    ],
)
def test_the_defaults_are_the_paper_s(step: int, r_max: float, d_max: float) -> None:
    assert at(Limits(), step) == pytest.approx((r_max, d_max))


@given(
    r_max=st.floats(1, 10), d_max=st.floats(0, 10), start=st.integers(0, 1000),
    r_length=st.integers(0, 1000), d_length=st.integers(0, 1000), step=st.integers(0, 3000),
)  # fmt: skip
def test_every_ramp_is_the_straight_line_of_the_formulas(
    r_max: float, d_max: float, start: int, r_length: int, d_length: int, step: int
) -> None:
    ends = start, start + r_length, start + d_length
    assert at(Limits(r_max, d_max, *ends), step) == pytest.approx(Ramps(r_max, d_max, *ends).at(step))


def test_constant_limits_hold_from_the_first_step() -> None:
    for step in (0, 1, 10**6):
        assert at(Limits.constant(2.0, 1.0), step) == (2.0, 1.0)
    assert at(Limits.constant(), 0) == (3.0, 5.0)


def test_a_ramp_of_no_length_is_a_switch() -> None:
    limits = Limits(3.0, 5.0, start=100_000, r_end=100_000, d_end=100_000)
    assert at(limits, 99_999) == (1.0, 0.0)
    assert at(limits, 100_000) == (3.0, 5.0)


def test_a_ramp_to_no_limit_is_that_of_the_reciprocal() -> None:
    limits = Limits.over(1_300, math.inf, math.inf)  # start 50, r_end 400, d_end 250
    assert at(limits, 49) == at(limits, 50) == (1.0, 0.0)
    assert at(limits, 225) == pytest.approx((1 / (1 - 0.5), 0.875 / (1 - 0.875)))
    assert at(limits, 250)[1] == math.inf
    assert at(limits, 399)[0] == pytest.approx(350)
    assert at(limits, 400) == at(limits, 10**9) == (math.inf, math.inf)
    for step in (0, 50, 225, 399, 400):  # on a GPU and compiled they are tensors
        ramps = zip(((1.0, math.inf, 400), (0.0, math.inf, 250)), limits.at(step), strict=True)
        for ramp, expected in ramps:
            assert float(limits._ramp(torch.tensor(float(step)), *ramp)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("limits", [Limits.constant(math.inf, math.inf), Limits.over(10, math.inf, math.inf)], ids=str)
@pytest.mark.parametrize("channels_per_group", [1, 2])
@pytest.mark.usefixtures("each_backend")
def test_without_limits_training_computes_what_evaluation_does(limits: Limits, channels_per_group: int) -> None:
    layer = BatchRenorm1d(4, limits=limits, examples_per_group=2, channels_per_group=channels_per_group, momentum=0.3)
    for _ in range(10):
        layer(torch.randn(8, 4, 5) * 3 + torch.arange(4)[:, None])
    x = torch.randn(8, 4, 5) * 50 - 20
    x[:2] = 7.0  # groups without a spread
    expected = layer.eval()(x)
    y = layer.train()(x.requires_grad_())
    assert y.isfinite().all()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.isfinite().all()


def test_limits_may_be_infinite_without_a_ramp() -> None:
    assert at(Limits.constant(math.inf, math.inf), 0) == (math.inf, math.inf)
    assert at(Limits(math.inf, math.inf, start=5, r_end=5, d_end=5), 4) == (1.0, 0.0)


@pytest.mark.parametrize("total_steps", [1, 2, 26, 1_000, 64_000, 130_000, 1_300_000])
def test_limits_over_a_training_are_the_paper_s_in_proportion(total_steps: int) -> None:
    limits = Limits.over(total_steps, r_max=2.0, d_max=4.0)
    assert (limits.r_max, limits.d_max) == (2.0, 4.0)
    expected = [max(1, total_steps * step / 130_000) for step in (5_000, 40_000, 25_000)]
    assert [limits.start, limits.r_end, limits.d_end] == pytest.approx(expected, abs=0.5)
    assert at(limits, total_steps) == (2.0, 4.0)


def test_limits_over_the_paper_s_own_training_are_the_defaults() -> None:
    assert Limits.over(130_000) == Limits()


def test_limits_cannot_be_changed_by_accident() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().r_max = 2.0  # type: ignore[misc]
    assert hash(Limits()) == hash(Limits.over(130_000))


def test_limits_are_computed_where_the_step_is() -> None:
    for limit in Limits()(torch.tensor(7, device="meta"), torch.float32):
        assert limit.is_meta
        assert limit.dtype == torch.float32
        assert limit.shape == ()


def test_the_step_is_the_number_of_batches_before_this_one() -> None:
    """The first batch has t = 0."""
    layer = BatchRenorm1d(1, limits=Limits(3.0, 5.0, start=1, r_end=1, d_end=1), affine=False)
    x = torch.tensor([[9.0], [11.0]])
    assert layer(x).mean().item() == pytest.approx(0.0, abs=1e-6)
    assert layer(x).mean().item() == pytest.approx(5.0)


def test_the_step_moves_only_when_the_statistics_move() -> None:
    layer = BatchRenorm1d(1)
    layer(torch.full((4, 1), math.nan))
    layer(torch.randn(0, 1))
    layer(torch.randn(4, 1), torch.zeros(4, dtype=torch.bool))
    layer.eval()(torch.randn(4, 1))
    assert layer.num_batches_tracked == 0
