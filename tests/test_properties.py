"""What must hold for every input: agreement with the formulas, and the mathematics' own identities."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, note
from hypothesis import strategies as st
from oracle import Oracle, Ramps, assert_agrees, example_groups
from torch import Tensor

import renorm
from renorm import functional

pytestmark = pytest.mark.usefixtures("each_backend")

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
TRACKING = ("std", "var", "total")


@dataclass
class Case:
    """An input and all that can be set about its normalization."""

    x: Tensor
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    options: dict[str, Any]  # grouping, eps
    limits: tuple[float, float] | None
    running: tuple[Tensor, Tensor]

    def oracle(self) -> Oracle:
        limits = Ramps(*self.limits) if self.limits else None
        parameters = {name: _exact(getattr(self, name)) for name in ("weight", "bias")}
        oracle = Oracle(self.x.shape[1], **self.options, **parameters, limits=limits)
        oracle.mean, oracle.var = (statistic.double() for statistic in self.running)
        return oracle

    def train(self, x: Tensor) -> tuple[Tensor, renorm.Moments]:
        if self.limits is None:
            return functional.batch_norm(x, self.weight, self.bias, mask=self.mask, **self.options)
        r_max, d_max = self.limits
        return functional.batch_renorm(
            x, *self.running, self.weight, self.bias, r_max=r_max, d_max=d_max, mask=self.mask, **self.options
        )


def _exact(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().requires_grad_()


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same shape in another layout; expanded ones repeat the first values instead."""
    if layout == "channels last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = torch.full(
            (values.shape[0] * 2, values.shape[1] + 1, *values.shape[2:], 2), math.nan, dtype=values.dtype
        )
        wide[::2, 1:, ..., 1] = values
        return wide[::2, 1:, ..., 1]
    if layout == "expanded over positions" and values.ndim > 2:
        return values[..., :1].expand(values.shape)
    if layout == "expanded over examples":
        return values[:1].expand(values.shape)
    return values


LAYOUTS = (
    "contiguous", "channels last", "transposed", "sliced", "expanded over positions", "expanded over examples",
)  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)) -> Case:
    dtype = draw(st.sampled_from(dtypes))
    num_examples = draw(st.integers(1, 9))
    channels_per_group, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_channels = channels_per_group * groups
    positions = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    examples_per_group = draw(st.none() | st.integers(1, 10))
    limits = draw(st.none() | st.tuples(st.floats(1, 4), st.floats(0, 6)))

    torch.manual_seed(draw(st.integers(0, 2**32)))
    per_channel = (num_channels,) + (1,) * len(positions)
    mean, spread = draw(st.floats(-10, 10)), draw(st.sampled_from((0.1, 1.0, 10.0)))
    values = torch.randn(num_examples, num_channels, *positions, dtype=torch.float64)
    values = values * spread * (torch.rand(per_channel, dtype=torch.float64) + 0.5) + mean * torch.randn(
        per_channel, dtype=torch.float64
    )
    x = lay_out(values.to(dtype), draw(st.sampled_from(LAYOUTS)))

    mask = None
    if draw(st.booleans()):
        shape = [draw(st.sampled_from((1, size))) for size in (num_examples, *positions)]
        mask = torch.rand(shape) < draw(st.sampled_from((0.3, 0.8)))
    parameter_dtype = draw(st.sampled_from((torch.promote_types(dtype, torch.float32), dtype)))
    with_weight, with_bias = draw(st.sampled_from(((True, True), (True, False), (False, False))))
    weight = torch.randn(num_channels).to(parameter_dtype).requires_grad_() if with_weight else None
    bias = torch.randn(num_channels).to(parameter_dtype).requires_grad_() if with_bias else None
    running_dtype = torch.promote_types(dtype, torch.float32)
    running_mean = mean * torch.randn(num_channels, dtype=running_dtype)
    running_var = (spread * (torch.rand(num_channels, dtype=running_dtype) + 0.2)) ** 2

    sizes = [len(group) for group in example_groups(num_examples, examples_per_group)]
    if min(sizes) * channels_per_group * math.prod(positions) == 1:
        limits = limits or (2.0, 1.0)  # a single element is refused without limits
    options = {
        "examples_per_group": examples_per_group,
        "channels_per_group": channels_per_group,
        "eps": draw(st.sampled_from((1e-5, 1e-3))),
    }
    case = Case(x, mask, weight, bias, options, limits, (running_mean, running_var))
    note(f"x {dtype} {tuple(x.shape)} strides {x.stride()}, {options}, {limits}, mask {mask}")
    return case


def check_gradients(y: Tensor, x: Tensor, exact_y: Tensor, exact_x: Tensor, case: Case, oracle: Oracle) -> None:
    if not exact_y.requires_grad:  # nothing counts
        exact_y = exact_y + 0 * sum(leaf.sum() for leaf in _given(exact_x, oracle.weight, oracle.bias))
    tolerance = TOLERANCE[x.dtype] * max(1.0, oracle.condition / 32)
    dy = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)
    actual = torch.autograd.grad(y, [x, *_given(case.weight, case.bias)], dy)
    expected = torch.autograd.grad(exact_y, [exact_x, *_given(oracle.weight, oracle.bias)], dy.double())
    assert_agrees(actual[0], expected[0], tolerance, scale=oracle.gradient_scale * float(dy.abs().max()))
    largest = float((exact_y.detach() - (0 if oracle.bias is None else _per_channel(oracle.bias, x))).abs().max())
    if oracle.weight is not None:
        largest /= float(oracle.weight.detach().abs().min())
    for gradient, exact in zip(actual[1:], expected[1:], strict=True):
        parameter_tolerance = max(tolerance, TOLERANCE[gradient.dtype])
        assert_agrees(gradient, exact, parameter_tolerance, scale=float(dy.abs().sum()) * max(1.0, largest))


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _per_channel(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor.detach().view(-1, *(1,) * (x.ndim - 2))


def check_training(case: Case) -> None:
    oracle = case.oracle()
    x, exact_x = case.x.requires_grad_(), case.x.detach().double().requires_grad_()
    (y, moments), exact_y = case.train(x), oracle.train(exact_x, case.mask)
    tolerance = TOLERANCE[x.dtype] * max(1.0, oracle.condition / 32)
    assert y.dtype == x.dtype
    assert_agrees(y, exact_y, tolerance, scale=1.0)
    assert all(moment.dtype == torch.promote_types(x.dtype, torch.float32) for moment in moments)
    assert (moments.var >= 0).all()
    check_gradients(y, x, exact_y, exact_x, case, oracle)


@given(cases())
def test_training_agrees_with_the_formulas_in_every_shape_layout_grouping_and_mask(case: Case) -> None:
    check_training(case)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 2, 3), (4, 3, 1, 1), (1, 3, 1, 4), (4, 3, 1, 2)], ids=str)
def test_the_order_of_the_dimensions_in_memory_does_not_matter(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64)
    inverse = [order.index(dim) for dim in range(4)]
    x = values.permute(order).contiguous().permute(inverse)
    dy, weight, bias = torch.randn_like(values), torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    some = torch.rand(shape[0], *shape[2:]) < 0.7
    some[0, 0, 0] = True
    for mask, n, k in itertools.product((None, some), (None, 2, 3), (1, 3)):
        options: dict[str, Any] = {"mask": mask, "examples_per_group": n, "channels_per_group": k}
        results = []
        for given_x, given_dy in ((values, dy), (x, dy), (values, dy.permute(order).contiguous().permute(inverse))):
            leaves = [leaf.detach().requires_grad_() for leaf in (given_x, weight, bias)]
            y, _ = functional.renormalize(
                leaves[0], *_some_r_and_d(shape[0], n, k), leaves[1], leaves[2], **options, eps=1e-3
            )
            results.append((y, *torch.autograd.grad(y, leaves, given_dy)))
        for other in results[1:]:
            for tensor, expected in zip(other, results[0], strict=True):
                torch.testing.assert_close(tensor, expected)


def _some_r_and_d(num_examples: int, examples_per_group: int | None, channels_per_group: int) -> tuple[Tensor, Tensor]:
    shape = len(example_groups(num_examples, examples_per_group)), 3 // channels_per_group
    return torch.full(shape, 1.5), torch.full(shape, -0.5)


@given(cases(dtypes=(torch.float16, torch.bfloat16)))
def test_training_in_half_precision_agrees_with_the_formulas(case: Case) -> None:
    check_training(case)


@given(cases(dtypes=tuple(TOLERANCE)), st.sampled_from((0.0, 0.01, 0.5, 1.0)))
def test_evaluation_agrees_with_the_formulas_in_every_shape_layout_grouping_and_mask(case: Case, alpha: float) -> None:
    oracle = case.oracle()
    oracle.example_weight = alpha
    x, exact_x = case.x.requires_grad_(), case.x.detach().double().requires_grad_()
    options = {name: case.options[name] for name in ("channels_per_group", "eps")}
    y = functional.weighted_batch_norm(
        x, *case.running, case.weight, case.bias, example_weight=alpha, mask=case.mask, **options
    )
    exact_y = oracle.evaluate(exact_x, case.mask)
    tolerance = TOLERANCE[x.dtype] * max(1.0, oracle.condition / 32)
    assert y.dtype == x.dtype
    assert_agrees(y, exact_y, tolerance, scale=1.0)
    check_gradients(y, x, exact_y, exact_x, case, oracle)


@given(cases(), st.sampled_from(TRACKING), st.sampled_from((0.01, 0.5, 1.0)))
def test_tracking_agrees_with_the_formulas_in_every_shape_grouping_and_mask(
    case: Case, tracking: str, momentum: float
) -> None:
    k = case.options["channels_per_group"]
    assume(k == 1 or (case.x[0, 0].numel() * case.x.shape[0] > 1 and case.mask is None))  # else not defined for k > 1
    oracle = case.oracle()
    oracle.tracking, oracle.momentum = tracking, momentum
    oracle.train(case.x.double(), case.mask)
    _, moments = case.train(case.x)
    assume(bool((moments.count > 0).any()))  # the layer skips the others
    mean, var = functional.update_running(
        *case.running, moments, momentum=momentum, tracking=tracking, channels_per_group=k, eps=case.options["eps"]
    )
    tolerance = TOLERANCE[case.x.dtype]
    assert_agrees(mean, oracle.mean, tolerance, scale=float(case.x.abs().max()))
    assert_agrees(var, oracle.var, tolerance * max(1.0, oracle.condition / 32), scale=case.options["eps"])


@given(cases(dtypes=(torch.float64,)))
def test_null_space_of_the_gradient(case: Case) -> None:
    """sum_i dL/dx_i = 0 and sum_i x_i dL/dx_i = m r mean(g z) eps / (var + eps), over every group."""
    x = case.x.detach().clone().requires_grad_()
    y, _ = case.train(x)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    n, k, eps = case.options["examples_per_group"], case.options["channels_per_group"], case.options["eps"]
    oracle = case.oracle()
    oracle.train(x, case.mask)
    keep = oracle.counted(x, case.mask)
    g = dy if case.weight is None else dy * _per_channel(case.weight, x)
    size = oracle.gradient_scale * float(dy.abs().max())
    corrections = iter(oracle.corrections)
    for examples in example_groups(x.shape[0], n):
        for channels in torch.arange(x.shape[1]).split(k):
            block = torch.tensor(examples)[:, None], channels[None, :]
            values, gradient, of_x_hat = (t.detach()[block][keep[block]] for t in (x, dx, g))
            if values.numel() == 0:
                continue
            m, mean, var = values.numel(), values.mean(), values.var(correction=0)
            r, _ = next(corrections)
            z = (values - mean) / (var + eps).sqrt()
            assert float(gradient.sum().abs()) <= 1e-11 * m * size
            expected = m * r * (of_x_hat * z).mean() * eps / (var + eps)
            assert float(((values * gradient).sum() - expected).abs()) <= 1e-10 * m * size * max(1, values.abs().max())


@given(cases(dtypes=(torch.float64, torch.float32)))
def test_training_output_stays_in_its_range(case: Case) -> None:
    """|z| <= sqrt(m - 1), and with the correction r sqrt(m - 1) + |d| (P2, appendix A)."""
    case.weight = case.bias = None
    y, moments = case.train(case.x)
    oracle = case.oracle()
    oracle.train(case.x, case.mask)
    slack = 1e-4 * max(1.0, oracle.condition / 32)
    n, k = case.options["examples_per_group"], case.options["channels_per_group"]
    corrections = iter(oracle.corrections)
    for g, examples in enumerate(example_groups(case.x.shape[0], n)):
        for channels in torch.arange(case.x.shape[1]).split(k):
            m = float(moments.count[g, 0]) * k
            if m:
                r, d = next(corrections)
                largest = float(y[torch.tensor(examples)[:, None], channels[None, :]].abs().max())
                assert largest <= (r * math.sqrt(m - 1) + abs(d)) * (1 + slack) + slack


def test_training_output_reaches_its_range() -> None:
    x = torch.zeros(101, 1, dtype=torch.float64)
    x[0] = 1.0
    y, _ = functional.batch_norm(x, eps=0.0)
    torch.testing.assert_close(y.max(), torch.tensor(10.0, dtype=torch.float64))


@pytest.mark.parametrize("tracking", TRACKING)
@pytest.mark.parametrize("shape", [(9, 6), (9, 6, 5), (9, 6, 4, 3), (9, 6, 2, 3, 2)], ids=lambda s: f"{len(s)}d")
@pytest.mark.parametrize("channels_per_group", [1, 3, 6])
@pytest.mark.parametrize("examples_per_group", [None, 1, 4, 2])
@pytest.mark.parametrize("mean", [0.0, 30.0, 1e4])
def test_unclipped_training_output_is_the_evaluation_output(
    mean: float, examples_per_group: int | None, channels_per_group: int, shape: tuple[int, ...], tracking: Any
) -> None:
    layer = renorm.Norm(
        6, examples_per_group=examples_per_group, channels_per_group=channels_per_group, tracking=tracking,
        limits=renorm.Limits.constant(math.inf, math.inf),
    )  # fmt: skip
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    layer.running_mean.fill_(mean)  # as after a training, and no further from the data than d can say
    for _ in range(3):
        layer(torch.randn(shape) * 2 + mean)
    x = torch.randn(shape) * 1.5 + mean + 1
    evaluated = layer.eval()(x)
    trained = layer.train()(x)
    sigma = 2.0
    bound = 1e-5 * (1 + mean / sigma) * max(1.0, float(evaluated.detach().abs().max()))
    assert float((trained - evaluated).detach().abs().max()) <= bound


@given(cases(dtypes=(torch.float32,)))
def test_unclipped_training_output_is_the_evaluation_output_in_every_shape(case: Case) -> None:
    case.limits = (math.inf, math.inf)
    trained, _ = case.train(case.x)
    options = {name: case.options[name] for name in ("channels_per_group", "eps")}
    evaluated = functional.weighted_batch_norm(case.x, *case.running, case.weight, case.bias, mask=case.mask, **options)
    oracle = case.oracle()
    oracle.train(case.x, case.mask)
    oracle_condition = oracle.condition
    oracle.evaluate(case.x, case.mask)
    bound = 1e-5 * (1 + max(oracle_condition, oracle.condition)) * max(1.0, float(evaluated.detach().abs().max()))
    assert float((trained - evaluated).detach().abs().max()) <= bound


@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    layout=st.sampled_from(("contiguous", "channels last", "transposed", "sliced")),
    alpha=st.sampled_from((0.0, 0.3, 1.0)),
    channels_per_group=st.sampled_from((1, 2)),
    masked=st.booleans(),
)
def test_evaluation_of_an_example_depends_on_no_other_bit_for_bit(
    seed: int, sizes: list[int], layout: str, alpha: float, channels_per_group: int, masked: bool
) -> None:
    torch.manual_seed(seed)
    num_examples, num_channels, *positions = sizes
    num_channels *= channels_per_group
    x, others = torch.randn(2, num_examples, num_channels, *positions)
    others = torch.where(torch.rand(others.shape) < 0.2, math.nan, others * 100 + 1)
    others[0] = x[0]
    mask = torch.rand(num_examples, *positions) < 0.7 if masked else None
    running = torch.randn(num_channels), torch.rand(num_channels)

    def evaluate(x: Tensor) -> Tensor:
        return functional.weighted_batch_norm(
            lay_out(x, layout), *running, example_weight=alpha, mask=mask, channels_per_group=channels_per_group
        )

    assert torch.equal(evaluate(x)[0], evaluate(others)[0])


@given(cases(dtypes=(torch.float64,)))
def test_equal_examples_in_a_group_are_no_different_from_one_alone(case: Case) -> None:
    assume(case.options["examples_per_group"] is None)
    twice, _ = Case.train(
        Case(**{**vars(case), "x": torch.cat([case.x, case.x]), "mask": _doubled(case.mask, case.x)}),
        torch.cat([case.x, case.x]),
    )
    once, _ = case.train(case.x)
    torch.testing.assert_close(twice, torch.cat([once, once]), rtol=1e-9, atol=1e-9)


def _doubled(mask: Tensor | None, x: Tensor) -> Tensor | None:
    return None if mask is None else torch.cat([mask.expand(x.shape[0], *x.shape[2:])] * 2)
