"""The Triton kernels against torch's operations in float64: on a GPU, or, without one, in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from renorm import functional
from renorm.activation import activate
from renorm.grouping import Grouping
from renorm.limits import Limits
from renorm.moments import Moments
from renorm.ops import backends, dispatch
from renorm.ops.problem import Correction, Inputs, Running, RunningState, Settings, Target
from renorm.ops.schema import Saved
from renorm.ops.tracking import Rule

pytest.importorskip("triton")
from renorm.ops.triton import launch, settle, tiles
from renorm.ops.triton.moments import IN_MEMORY

# Of the interpreter of Triton 3.4.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

GROUPINGS = {"batch": (None, 1), "ghost": (2, 1), "batch-group": (2, 2), "group": (1, 2), "layer": (1, 4)}
# As few positions as have planes within tiles, across and over several: the interpreter scans one in a millisecond.
LAYOUTS = {"(N, C)": (), "short planes": (2, 2), "planes": (3, 3), "long planes": (21,)}
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish")
# Where a derivative jumps.
KINKS: dict[str | None, tuple[float, ...]] = {
    "relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3)
}  # fmt: skip


@pytest.fixture(autouse=True)
def _on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for device in backends.available:  # what is compared with goes by torch's operations
        monkeypatch.setitem(backends.available, device, False)
    with torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few elements, so that small tensors have many: the interpreter is slow."""
    monkeypatch.setattr(tiles, "_THREADS_PER_WARP", 1)
    monkeypatch.setattr(tiles, "_CHANNELS", (4,))
    monkeypatch.setattr(tiles, "_BYTES_PER_PARTIAL", 16)
    monkeypatch.setattr(settle, "SLOTS", 4)
    monkeypatch.setattr(settle, "SHARING_SLOTS", 4)
    monkeypatch.setattr(settle, "SHARING_CHANNELS", 2)
    monkeypatch.setattr(launch, "_plans", {})


@pytest.fixture(params=[False, True], ids=["in one", "in three"])
def in_three(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether what would fit a program is cut into tiles all the same."""
    if request.param:
        monkeypatch.setattr(tiles, "_ON_CHIP_BYTES", 0)
    return bool(request.param)


def draw(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64).to(dtype)
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else values


def error(actual: Tensor, expected: Tensor, scale: float = 1.0) -> float:
    """The largest difference, over the largest number that is right, if that is more than scale."""
    return float((actual.double() - expected).abs().max()) / max(scale, float(expected.abs().max()))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
def test_forward_and_gradients_agree_with_torch_in_float64(
    grouping: tuple[int | None, int], layout: tuple[int, ...], channels_last: bool, in_three: bool
) -> None:
    turns = itertools.product(TOLERANCE, (False, True), (False, True), ACTIVATIONS)
    for i, (dtype, has_residual, has_mask, act) in enumerate(turns):
        # a group of its own for every example takes the interpreter longest
        each = 61 if grouping[0] == 1 and layout else 37
        if i % each != (5 * len(layout) + 11 * in_three + 7 * channels_last + (grouping[0] or 0) + grouping[1]) % each:
            continue  # a few in each case, all of them over the cases
        shape = (5, 4, *layout)
        x, residual, dy = (draw(shape, dtype, channels_last) for _ in range(3))
        wide = torch.promote_types(dtype, torch.float32)
        weight, bias, mean = (torch.randn(4, dtype=wide) for _ in range(3))
        var = torch.rand(4, dtype=wide) + 0.5
        mask = torch.rand(shape[0], *shape[2:]) < 0.7 if has_mask else None
        limits = torch.tensor(1.5), torch.tensor(0.5)
        options = {"examples_per_group": grouping[0], "channels_per_group": grouping[1]}

        leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias, residual)]
        before, exact_moments = functional.batch_renorm(
            leaves[0], mean.double(), var.double(), *leaves[1:3], r_max=1.5, d_max=0.5, mask=mask, **options
        )
        if has_residual:
            before = before + (leaves[3] if mask is None else leaves[3].where(mask.unsqueeze(1), 0))
        # near a kink, rounding decides on which side an element lies
        for kink in KINKS.get(act, ()):
            dy = dy.where((before - kink).abs() > 4 * TOLERANCE[dtype], 0)
        exact = activate(before, act)
        gradients = torch.autograd.grad(exact, leaves if has_residual else leaves[:3], dy.double())

        given = residual if has_residual else None
        settings = Settings(Grouping(*grouping), 1e-5, act)
        y, *moments, coefficients = launch.normalize(
            Inputs(x, weight, bias, mask, given), settings, Target(mean, var, *limits)
        )
        saved = Saved(x, weight, bias, mask, given, None, moments[2], coefficients)
        found = launch.normalize_backward(dy, saved, settings.grouping, act, has_residual)[: 3 + has_residual]

        case = (dtype, has_residual, has_mask, act)
        assert y.dtype == dtype, case
        assert y.stride() == x.stride(), case
        for actual, expected in zip((y, *moments), (exact.detach(), *exact_moments), strict=True):
            assert error(actual, expected) <= TOLERANCE[dtype], case
        for actual, expected in zip(found, gradients, strict=True):
            assert error(actual, expected, float(dy.abs().max())) <= TOLERANCE[dtype], case


def test_gradients_come_from_the_output_as_from_the_input(in_three: bool) -> None:
    for act in ("relu", "relu6", "leaky_relu"):
        x, residual, dy = (torch.randn(5, 4, 7) for _ in range(3))
        settings = Settings(Grouping(), 1e-5, act)
        y, _, _, count, coefficients = launch.normalize(Inputs(x, residual=residual), settings, None)
        kept_residual = Saved(x, None, None, None, residual, None, count, coefficients)
        kept_y = kept_residual._replace(residual=None, y=y)
        from_x = launch.normalize_backward(dy, kept_residual, Grouping(), act, True)
        from_y = launch.normalize_backward(dy, kept_y, Grouping(), act, True)
        for one, other in zip(from_x, from_y, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
def test_r_and_d_may_be_given(grouping: tuple[int | None, int], in_three: bool) -> None:
    x, weight, bias = torch.randn(5, 4, 5), torch.randn(4), torch.randn(4)
    groups = 1 if grouping[0] is None else {2: 2, 1: 5}[grouping[0]]
    r, d = (torch.rand(groups, 4 // grouping[1]) + 0.5 for _ in range(2))
    y, *_ = launch.normalize(Inputs(x, weight, bias), Settings(Grouping(*grouping), 1e-5), Correction(r, d))
    exact, _ = functional.renormalize(
        x.double(), r.double(), d.double(), weight.double(), bias.double(),
        examples_per_group=grouping[0], channels_per_group=grouping[1],
    )  # fmt: skip
    assert error(y, exact) < 1e-5


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_evaluation_agrees(alpha: float, k: int, channels_last: bool, in_three: bool) -> None:
    for act, has_mask in itertools.product((None, "silu"), (False, True)):
        x = draw((3, 4, 4, 5), torch.float32, channels_last)
        residual, weight, bias, mean = torch.randn_like(x), torch.randn(4), torch.randn(4), torch.randn(4)
        var, mask = torch.rand(4) + 0.5, torch.rand(3, 4, 5) < 0.6 if has_mask else None
        inputs = Inputs(x, weight, bias, mask, residual)
        y = launch.evaluate(inputs, Settings(Grouping(None, k), 1e-5, act), Running(mean, var), alpha)
        exact = functional.weighted_batch_norm(
            x.double(), mean.double(), var.double(), weight.double(), bias.double(), example_weight=alpha, mask=mask,
            channels_per_group=k, residual=residual.double(), act=act,
        )  # fmt: skip
        assert error(y, exact) < 1e-5, (act, has_mask)


@pytest.mark.parametrize("tracking", ["std", "var", "total"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_as_elsewhere(tracking: Any, momentum: float | None) -> None:
    faulty = torch.randn(2, 5).index_fill(1, torch.tensor(3), float("nan"))
    for mean, count in ((torch.randn(2, 5), 8.0), (torch.randn(2, 5), 1.0), (faulty, 8.0), (torch.randn(2, 5), 0.0)):
        moments = Moments(mean, torch.rand(2, 5), torch.tensor([[count], [count / 2]]))
        states = [
            RunningState(torch.full((5,), 0.5), torch.full((5,), 2.0), torch.tensor(3), torch.tensor(1))
            for _ in range(2)
        ]
        rule, settings = Rule(tracking, momentum), Settings(Grouping(), 1e-5)
        launch.track(states[0], moments, rule, settings)
        dispatch.track(states[1], moments, rule, settings)
        for ours, expected in zip(*states, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_limits_may_be_in_memory(in_three: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, mean, var = torch.randn(6, 4, 5) * 3 + 2, torch.zeros(4), torch.ones(4)
    arguments = Inputs(x), Settings(Grouping(), 1e-5), Target(mean, var, torch.tensor(1.2), torch.tensor(0.3))
    by_number = launch.normalize(*arguments)
    monkeypatch.setattr(launch, "_limits", lambda *limits: ((IN_MEMORY, (0.0,) * 5), limits))
    for one, other in zip(launch.normalize(*arguments), by_number, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_a_large_mean_costs_no_digits(channels_last: bool, in_three: bool) -> None:
    x = draw((40, 3, 9), torch.float64, channels_last).add(1e4).float()
    x[0] -= 1e4
    y, _, var, *_ = launch.normalize(Inputs(x), Settings(Grouping(), 1e-5), None)
    exact, moments = functional.batch_norm(x.double())
    assert error(y, exact) < 1e-5
    assert error(var / moments.var, torch.ones(1)) < 1e-5


@pytest.mark.parametrize("step", [0, 3, 5, 7, 9, 20])
@pytest.mark.parametrize("infinite", [False, True], ids=["finite", "infinite"])
def test_limits_are_those_of_the_step(step: int, infinite: bool, in_three: bool) -> None:
    high = (float("inf"),) * 2 if infinite else (1.5, 0.7)
    limits = Limits(*high, start=3, r_end=9, d_end=7)
    x = torch.randn(6, 4, 5, dtype=torch.float64) * 3 + 2
    settings = Settings(Grouping(), 1e-5)
    state = RunningState(torch.zeros(4).double(), torch.ones(4).double(), torch.tensor(step), torch.tensor(0))
    expected, *_ = launch.normalize(
        Inputs(x), settings, Target(state.mean.clone(), state.var.clone(), *limits.at(step))
    )
    y, *_ = launch.step(Inputs(x), settings, state, limits, Rule("std", 0.1))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracking", ["std", "var", "total"])
def test_a_step_moves_the_running_statistics_as_elsewhere(
    tracking: Any, momentum: float | None, grouping: tuple[int | None, int], in_three: bool
) -> None:
    settings, rule = Settings(Grouping(*grouping), 1e-5), Rule(tracking, momentum)
    for faulty in (False, True):
        x = torch.randn(5, 4) + 2
        if faulty:
            x[1, 2] = float("nan")
        states = [
            RunningState(torch.full((4,), 0.5), torch.full((4,), 2.0), torch.tensor(3), torch.tensor(1))
            for _ in range(2)
        ]
        for state, train in zip(states, (launch.step, dispatch.train), strict=True):
            train(Inputs(x), settings, state, None, rule)
        for ours, expected in zip(*states, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_later_call_of_a_kind_takes_its_own_numbers(in_three: bool) -> None:
    settings = Settings(Grouping(), 1e-5)
    for _ in range(2):
        x = torch.randn(4, 3, 6)
        y, *_ = launch.normalize(Inputs(x), settings, None)
        assert error(y, functional.batch_norm(x.double())[0]) < 1e-5
    for alpha in (0.2, 0.7):
        y = launch.evaluate(Inputs(x), settings, Running(torch.zeros(3), torch.ones(3)), alpha)
        exact = functional.weighted_batch_norm(
            x.double(), torch.zeros(3).double(), torch.ones(3).double(), example_weight=alpha
        )
        assert error(y, exact) < 1e-5


def test_parameters_may_lie_apart(in_three: bool) -> None:
    x, numbers = torch.randn(4, 6, 5), torch.arange(12.0).add(1)
    y, *_ = launch.normalize(Inputs(x, numbers[::2], numbers[1::2]), Settings(Grouping(), 1e-5), None)
    exact, _ = functional.batch_norm(x.double(), numbers[::2].double(), numbers[1::2].double())
    assert error(y, exact) < 1e-5
    r, d = torch.tensor([[2.0]]).expand(1, 6), torch.tensor([[0.5]]).expand(1, 6)
    y, *_ = launch.normalize(Inputs(x), Settings(Grouping(), 1e-5), Correction(r, d))
    assert error(y, functional.renormalize(x.double(), r.double(), d.double())[0]) < 1e-5


def test_a_backward_goes_by_the_layout_that_was_saved(in_three: bool) -> None:
    settings, rule = Settings(Grouping(), 1e-5), Rule("std", 0.1)
    x = draw((4, 6, 3, 2), torch.float32, channels_last=True)
    state = RunningState(torch.zeros(6), torch.ones(6), torch.tensor(0), torch.tensor(0))
    _, kept, plan = launch.step(Inputs(x), settings, state, None, rule)
    dy, found = torch.randn_like(x), []
    for saved in (x, x.contiguous(), x):
        found.append(launch.step_backward(dy, (saved, None, None, None, None, kept), plan, settings, False)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def test_tensors_of_other_devices_are_refused() -> None:
    x = torch.randn(4, 3, 5)
    weight = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match=r"must be on x's device, (cpu|cuda:0), got a tensor of shape \(3,\) on meta"):
        launch.normalize(Inputs(x, weight), Settings(Grouping(), 1e-5), None)


def test_one_channel_is_read_as_a_plane() -> None:
    assert not tiles.Layout.of(torch.empty(4, 1, 5, 5), Grouping()).channels_last
    assert tiles.Layout.of(torch.empty(4, 7), Grouping()).channels_last
