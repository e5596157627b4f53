"""The stateless functions: gradients by finite differences, constants of autograd, and torch's own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Oracle, Ramps, assert_agrees, example_groups
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from renorm import functional

pytestmark = pytest.mark.usefixtures("each_backend")

EXAMPLES, CHANNELS = 5, 4
POSITIONS = {"(N, C)": (), "(N, C, L)": (2,), "(N, C, H, W)": (2, 1), "(N, C, D, H, W)": (1, 2, 1)}
GROUPINGS = {
    "batch": (None, 1),
    "ghost, smaller last": (3, 1),
    "ghost, left-over joins": (2, 1),
    "channel groups": (None, 2),
    "batch-group": (3, 2),
    "group": (1, 2),
    "layer": (1, CHANNELS),
}
AFFINE = {"weight and bias": (True, True), "weight": (True, False), "no parameters": (False, False)}

rank = pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
grouping = pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
affine = pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE)
masked = pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])


def leaves(positions: tuple[int, ...], affine: tuple[bool, bool]) -> list[Tensor | None]:
    x = torch.randn(EXAMPLES, CHANNELS, *positions, dtype=torch.float64, requires_grad=True)
    return [x, *(torch.randn(CHANNELS, dtype=torch.float64, requires_grad=True) if is_ else None for is_ in affine)]


def mask_of(positions: tuple[int, ...], masked: bool) -> Tensor | None:
    if not masked:
        return None
    mask = torch.ones(EXAMPLES, *positions, dtype=torch.bool)
    mask.view(EXAMPLES, -1)[1] = False
    mask.view(EXAMPLES, -1)[3, -1] = False
    return mask


def per_group(examples_per_group: int | None, channels_per_group: int) -> tuple[int, int]:
    return len(example_groups(EXAMPLES, examples_per_group)), CHANNELS // channels_per_group


@rank
@grouping
@affine
@masked
def test_first_and_second_gradients_with_r_and_d_given(
    positions: tuple[int, ...], grouping: tuple[int | None, int], affine: tuple[bool, bool], masked: bool
) -> None:
    shape = per_group(*grouping)
    r, d = torch.rand(shape, dtype=torch.float64) + 0.5, torch.randn(shape, dtype=torch.float64)
    mask = mask_of(positions, masked)

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"mask": mask, "examples_per_group": grouping[0], "channels_per_group": grouping[1]}
        return functional.renormalize(x, r, d, weight, bias, **options, eps=1e-2)[0]

    inputs = leaves(positions, affine)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@grouping
@affine
@masked
def test_first_and_second_gradients_of_batch_norm(
    grouping: tuple[int | None, int], affine: tuple[bool, bool], masked: bool
) -> None:
    mask = mask_of((2,), masked)

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"mask": mask, "examples_per_group": grouping[0], "channels_per_group": grouping[1]}
        return functional.batch_norm(x, weight, bias, **options, eps=1e-2)[0]

    inputs = leaves((2,), affine)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@rank
@affine
@masked
@pytest.mark.parametrize("channels_per_group", [1, 2])
@pytest.mark.parametrize("example_weight", [0.0, 0.4, 1.0])
def test_first_and_second_gradients_of_evaluation(
    positions: tuple[int, ...], affine: tuple[bool, bool], masked: bool, channels_per_group: int, example_weight: float
) -> None:
    mask = mask_of(positions, masked)
    mean, var = torch.randn(CHANNELS, dtype=torch.float64), torch.rand(CHANNELS, dtype=torch.float64)

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return functional.weighted_batch_norm(
            x, mean, var, weight, bias,
            example_weight=example_weight, mask=mask, channels_per_group=channels_per_group, eps=1e-2,
        )  # fmt: skip

    inputs = leaves(positions, affine)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@masked
@pytest.mark.parametrize("grouping", [(None, 1), (2, 1), (3, 2)], ids=["batch", "ghost", "batch-group"])
def test_second_gradients_element_for_element(grouping: tuple[int | None, int], masked: bool) -> None:
    shape = per_group(*grouping)
    r, d = torch.rand(shape, dtype=torch.float64) + 0.5, torch.randn(shape, dtype=torch.float64)
    options: dict[str, Any] = {"examples_per_group": grouping[0], "channels_per_group": grouping[1]}

    def function(*inputs: Tensor) -> Tensor:
        x, weight, bias = inputs
        return functional.renormalize(x, r, d, weight, bias, mask=mask_of((2,), masked), **options, eps=1e-2)[0]

    inputs = leaves((2,), (True, True))
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@grouping
@masked
@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.1, 0.05), (3.0, 5.0)], ids=["plain", "clipped", "wide"])
def test_no_gradient_flows_through_r_and_d(
    grouping: tuple[int | None, int], masked: bool, limits: tuple[float, float]
) -> None:
    n, k = grouping
    x, weight, bias = leaves((3,), (True, True))
    mask, dy = mask_of((3,), masked), torch.randn(EXAMPLES, CHANNELS, 3, dtype=torch.float64)
    mean, var = torch.randn(CHANNELS, dtype=torch.float64), torch.rand(CHANNELS, dtype=torch.float64) + 0.5

    y, _ = functional.batch_renorm(
        x, mean, var, weight, bias,
        r_max=limits[0], d_max=limits[1], mask=mask, examples_per_group=n, channels_per_group=k,
    )  # fmt: skip
    actual = torch.autograd.grad(y, [x, weight, bias], dy)

    def exact(stop_gradient: bool) -> tuple[Tensor, ...]:
        oracle = Oracle(
            CHANNELS, weight=weight, bias=bias, limits=Ramps(*limits), examples_per_group=n, channels_per_group=k,
            stop_gradient=stop_gradient,
        )  # fmt: skip
        oracle.mean, oracle.var = mean, var
        return torch.autograd.grad(oracle.train(x, mask), [x, weight, bias], dy)

    for gradient, expected in zip(actual, exact(stop_gradient=True), strict=True):
        assert_agrees(gradient, expected, 1e-10, scale=1.0)
    if limits == (3.0, 5.0):  # else r and d are clipped, and have no gradient to stop
        assert not torch.allclose(actual[0], exact(stop_gradient=False)[0], rtol=1e-2)


def test_second_gradients_take_r_and_d_for_constants() -> None:
    x, weight, bias = leaves((3,), (True, True))
    mean, var = torch.randn(CHANNELS, dtype=torch.float64), torch.rand(CHANNELS, dtype=torch.float64) + 0.5
    oracle = Oracle(CHANNELS, weight=weight, bias=bias, limits=Ramps(3.0, 5.0))
    oracle.mean, oracle.var = mean, var
    outputs = (functional.batch_renorm(x, mean, var, weight, bias, r_max=3.0, d_max=5.0)[0], oracle.train(x))
    dy, ddx = torch.randn_like(x), torch.randn_like(x)
    second = []
    for y in outputs:
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        second.append(torch.autograd.grad(dx, [x, weight], ddx))
    for actual, expected in zip(*second, strict=True):
        assert_agrees(actual, expected, 1e-10)


def test_r_and_d_that_are_given_get_no_gradient() -> None:
    x, weight, bias = leaves((3,), (True, True))
    r, d = (torch.ones(1, CHANNELS, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y, _ = functional.renormalize(x, r, d, weight, bias)
    assert torch.autograd.grad(y.square().sum(), [r, d], allow_unused=True) == (None, None)


def test_the_running_statistics_get_no_gradient() -> None:
    x, weight, bias = leaves((3,), (True, True))
    mean = torch.zeros(CHANNELS, dtype=torch.float64, requires_grad=True)
    var = torch.ones(CHANNELS, dtype=torch.float64, requires_grad=True)
    y, _ = functional.batch_renorm(x, mean, var, weight, bias, r_max=3.0, d_max=5.0)
    assert torch.autograd.grad(y.square().sum(), [mean, var], allow_unused=True) == (None, None)


@grouping
@masked
def test_the_moments_are_those_of_every_channel_in_every_example_group(
    grouping: tuple[int | None, int], masked: bool
) -> None:
    n, k = grouping
    x, _, _ = leaves((3,), (False, False))
    mask = mask_of((3,), masked)
    _, moments = functional.batch_norm(x, mask=mask, examples_per_group=n, channels_per_group=k)
    assert not any(moment.requires_grad for moment in moments)
    for g, examples in enumerate(example_groups(EXAMPLES, n)):
        for c in range(CHANNELS):
            kept = x[examples, c] if mask is None else x[examples, c][mask[examples]]
            assert moments.count[g, 0] == kept.numel()
            if kept.numel():
                torch.testing.assert_close(moments.mean[g, c], kept.mean())
                torch.testing.assert_close(moments.var[g, c], kept.var(correction=0))


def test_batch_renorm_takes_limits_as_numbers_and_as_tensors() -> None:
    x, mean, var = torch.randn(6, 3), torch.randn(3), torch.rand(3)
    numbers, _ = functional.batch_renorm(x, mean, var, r_max=2, d_max=0.5)
    tensors, _ = functional.batch_renorm(x, mean, var, r_max=torch.tensor(2.0), d_max=torch.tensor(0.5))
    assert torch.equal(numbers, tensors)


def test_limits_of_one_and_zero_are_batch_norm() -> None:
    x, mean, var, weight = torch.randn(6, 3, 4), torch.randn(3), torch.rand(3), torch.randn(3)
    y, _ = functional.batch_renorm(x, mean, var, weight, r_max=1.0, d_max=0.0)
    torch.testing.assert_close(y, functional.batch_norm(x, weight)[0])


def test_infinite_limits_give_the_evaluation_output() -> None:
    x, mean, var = torch.randn(6, 3, 4), torch.randn(3) * 100, torch.rand(3)
    y, _ = functional.batch_renorm(x, mean, var, r_max=float("inf"), d_max=float("inf"))
    torch.testing.assert_close(y, functional.weighted_batch_norm(x, mean, var), rtol=1e-4, atol=1e-4)


def test_renormalize_by_the_batch_s_own_r_and_d_is_batch_renorm() -> None:
    x, mean, var = torch.randn(6, 3, 4), torch.randn(3), torch.rand(3) + 0.1
    sigma = (x.var((0, 2), correction=0) + 1e-5).sqrt()
    running_sigma = (var + 1e-5).sqrt()
    r = (sigma / running_sigma).clamp(1 / 3, 3)[None]
    d = ((x.mean((0, 2)) - mean) / running_sigma).clamp(-1, 1)[None]
    y, _ = functional.batch_renorm(x, mean, var, r_max=3, d_max=1)
    torch.testing.assert_close(y, functional.renormalize(x, r, d)[0])


X = torch.randn(6, 8, 3, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
WEIGHT, BIAS = torch.linspace(-1, 2, 8), torch.linspace(3, -1, 8)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param({}, lambda: F.batch_norm(X, None, None, WEIGHT, BIAS, training=True), id="batch norm"),
        pytest.param(
            {"examples_per_group": 1}, lambda: F.instance_norm(X, weight=WEIGHT, bias=BIAS), id="instance norm"
        ),
        pytest.param(
            {"examples_per_group": 1, "channels_per_group": 2},
            lambda: F.group_norm(X, 4, WEIGHT, BIAS),
            id="group norm",
        ),
        pytest.param(
            {"examples_per_group": 1, "channels_per_group": 8},
            lambda: F.group_norm(X, 1, WEIGHT, BIAS),
            id="layer norm",
        ),
        pytest.param(
            {"examples_per_group": 2},
            lambda: torch.cat([F.batch_norm(chunk, None, None, WEIGHT, BIAS, training=True) for chunk in X.split(2)]),
            id="ghost batch norm",
        ),
    ],
)
def test_a_grouping_is_torch_s_norm_of_that_name(ours: dict[str, Any], theirs: Any) -> None:
    torch.testing.assert_close(functional.batch_norm(X, WEIGHT, BIAS, **ours)[0], theirs())


@pytest.mark.parametrize(
    ("channels_per_group", "theirs"),
    [(1, lambda: F.instance_norm(X, weight=WEIGHT, bias=BIAS)), (4, lambda: F.group_norm(X, 2, WEIGHT, BIAS))],
    ids=["instance norm", "group norm"],
)
@pytest.mark.parametrize("running_var", [1e-6, 1.0, 1e6])
def test_an_example_weight_of_one_forgets_the_running_statistics(
    channels_per_group: int, theirs: Any, running_var: float
) -> None:
    mean, var = torch.linspace(-3, 3, 8) * running_var**0.5, torch.full((8,), running_var)
    y = functional.weighted_batch_norm(
        X, mean, var, WEIGHT, BIAS, example_weight=1.0, channels_per_group=channels_per_group
    )
    torch.testing.assert_close(y, theirs(), rtol=1e-4, atol=1e-5)


def test_an_example_weight_of_one_resolves_small_variances_beside_a_large_running_variance() -> None:
    x = torch.randn(4, 3, 50) * 1e-2
    y = functional.weighted_batch_norm(x, torch.zeros(3), torch.full((3,), 1e4), example_weight=1.0)
    torch.testing.assert_close(y, F.instance_norm(x), rtol=1e-4, atol=1e-5)


def test_evaluation_without_positions_at_weight_one_is_the_bias() -> None:
    y = functional.weighted_batch_norm(
        torch.randn(5, 3), torch.randn(3), torch.rand(3), bias=torch.arange(3.0), example_weight=1.0
    )
    torch.testing.assert_close(y, torch.arange(3.0).expand(5, 3), rtol=0, atol=1e-6)
