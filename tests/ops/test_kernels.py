"""The C++ kernels: numbers of every dtype, layout, grouping and activation, threads, and what torch knows of them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_agrees
from torch import Tensor, nn

import renorm
from renorm import functional
from renorm.activation import activate
from renorm.grouping import Grouping
from renorm.ops import backends
from renorm.ops.problem import Inputs, Settings
from renorm.ops.schema import NormalizeArguments

pytestmark = pytest.mark.usefixtures("kernels")

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish")
# Where a derivative jumps.
KINKS: dict[str | None, tuple[float, ...]] = {
    "relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3)
}  # fmt: skip
GROUPINGS = {"batch": (None, 1), "ghost": (3, 1), "batch-group": (2, 2), "group": (1, 4), "layer": (1, 8)}
LAYOUTS = {
    "(N, C)": (8,), "short planes": (8, 3, 3), "planes": (8, 9, 11), "long planes": (8, 5000), "3d": (8, 3, 4, 5),
}  # fmt: skip
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def draw(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64).to(dtype)
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else values


def composed(x: Tensor, residual: Tensor | None, act: Any, mask: Tensor | None, **options: Any) -> Tensor:
    """The same layer by torch's own operations, one after the other."""
    y = functional.batch_renorm(x, mask=mask, **options)[0]
    if residual is not None:
        y = y + (residual if mask is None else residual.where(mask.unsqueeze(1), 0))
    return activate(y, act)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward_and_gradients_agree_with_torch_in_float64(
    dtype: torch.dtype, grouping: tuple[int | None, int], layout: tuple[int, ...], channels_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    turns = itertools.product((False, True), (False, True), ACTIVATIONS)
    for i, (has_residual, has_mask, act) in enumerate(turns):
        if i % 3 != len(layout) % 3:  # a third of the combinations in each case; all of them over the cases
            continue
        shape = (7, *layout) if len(layout) > 1 else (7, 8)
        x, residual, dy = (draw(shape, dtype, channels_last) for _ in range(3))
        wide = torch.promote_types(dtype, torch.float32)
        weight, bias, mean = (torch.randn(8, dtype=wide) for _ in range(3))
        var = torch.rand(8, dtype=wide) + 0.5
        mask = torch.rand(shape[0], *shape[2:]) < 0.7 if has_mask else None
        options = {"r_max": 1.5, "d_max": 0.5, "examples_per_group": grouping[0], "channels_per_group": grouping[1]}

        def leaves(wanted: torch.dtype, *tensors: Tensor) -> list[Tensor]:
            return [tensor.detach().to(wanted).requires_grad_() for tensor in tensors]

        ours = leaves(dtype, x, residual) + leaves(wide, weight, bias)
        exact = leaves(torch.float64, x, residual, weight, bias)
        y, _ = functional.batch_renorm(
            ours[0], mean, var, *ours[2:], residual=ours[1] if has_residual else None, act=act, mask=mask, **options
        )
        with monkeypatch.context() as patch:
            patch.setitem(backends.available, "cpu", False)
            before = composed(
                exact[0], exact[1] if has_residual else None, None, mask,
                running_mean=mean.double(), running_var=var.double(), weight=exact[2], bias=exact[3], **options,
            )  # fmt: skip
            expected = activate(before, act)
            # near a kink, rounding decides on which side an element lies
            for kink in KINKS.get(act, ()):
                dy = dy.where((before - kink).abs() > 4 * TOLERANCE[dtype], 0)
            wanted = torch.autograd.grad(expected, exact, dy.double(), allow_unused=True)
        assert y.dtype == dtype
        assert_agrees(y, expected, TOLERANCE[dtype])
        gradients = torch.autograd.grad(y, ours, dy, allow_unused=True)
        for name, actual, right in zip(("x", "residual", "weight", "bias"), gradients, wanted, strict=True):
            assert (actual is None) == (right is None), name
            if actual is None or right is None:
                continue
            assert_agrees(actual, right, TOLERANCE[dtype], scale=float(dy.abs().max()))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
def test_first_and_second_gradients_with_activation_and_residual(act: Any, has_residual: bool, has_mask: bool) -> None:
    x, residual = (torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.rand(5, 3) < 0.8 if has_mask else None

    def layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        added = residual if has_residual else None
        y: Tensor = functional.batch_norm(x, weight, bias, residual=added, act=act, mask=mask, examples_per_group=3)[0]
        return y + 0 * residual

    leaves = (x, weight, bias, residual)
    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)


def test_a_residual_alone_may_want_a_second_gradient() -> None:
    x, residual = torch.randn(5, 4, 3), torch.randn(5, 4, 3, requires_grad=True)
    y, _ = functional.batch_norm(x, residual=residual, act="relu")
    (first,) = torch.autograd.grad(y.square().sum(), residual, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), residual)
    torch.testing.assert_close(second, 2.0 * (y > 0))


@pytest.mark.usefixtures("_four_threads")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("shape", "grouping"),
    [
        ((16, 32, 40, 40), (None, 1)),
        ((64, 256, 4, 4), (None, 1)),
        ((3, 4, 200, 200), (None, 1)),
        ((1, 64, 99, 99), (1, 64)),
        ((32, 64, 20, 20), (8, 2)),
    ],
)
def test_results_do_not_depend_on_the_number_of_threads(
    shape: tuple[int, ...], grouping: tuple[int | None, int], channels_last: bool
) -> None:
    x, dy = draw(shape, torch.float32, channels_last), torch.randn(shape)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        leaf = x.detach().requires_grad_()
        weight = torch.linspace(0.5, 2, shape[1]).requires_grad_()
        y, moments = functional.batch_norm(
            leaf, weight, examples_per_group=grouping[0], channels_per_group=grouping[1], act="relu"
        )
        results.append((y, *moments, *torch.autograd.grad(y, (leaf, weight), dy)))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_evaluation_without_gradient_agrees_with_that_which_has_one(
    act: Any, alpha: float, k: int, channels_last: bool
) -> None:
    x, residual = draw((6, 4, 5, 7), torch.float32, channels_last), torch.randn(6, 4, 5, 7)
    weight, bias, mean, var = torch.randn(4), torch.randn(4), torch.randn(4), torch.rand(4) + 0.5
    for mask, added in itertools.product((None, torch.rand(6, 5, 7) < 0.7), (None, residual)):
        options: dict[str, Any] = {"example_weight": alpha, "channels_per_group": k, "mask": mask, "act": act}
        fused = functional.weighted_batch_norm(x, mean, var, weight, bias, residual=added, **options)
        plain = functional.weighted_batch_norm(
            x.clone().requires_grad_(), mean, var, weight, bias, residual=added, **options
        )
        assert_agrees(fused, plain.detach())


def test_a_gradient_in_another_layout_is_taken_as_it_is_meant() -> None:
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    y, _ = functional.batch_norm(x)
    for gradient in (dy, dy.to(memory_format=torch.channels_last), dy.flip(3).flip(3).transpose(2, 3).mT):
        (dx,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
        torch.testing.assert_close(dx, torch.autograd.grad(y, x, dy, retain_graph=True)[0])
    (dx,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient
    assert_agrees(dx, torch.zeros_like(dx), 1e-9, scale=1.0)


def test_an_activation_saves_no_tensor_beside_the_input() -> None:
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        renorm.BatchRenorm2d(16, act="relu")(x)
    assert sum(saved.values()) < 1.05 * x.nbytes


@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_torch_agrees_with_the_registered_operation(act: str, channels_last: bool) -> None:
    x = draw((5, 4, 3, 3), torch.float32, channels_last).requires_grad_()
    weight, bias = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    residual = torch.randn(5, 4, 3, 3, requires_grad=True)
    limits = torch.tensor(2.0), torch.tensor(1.0)
    operation = torch.ops.renorm.normalize.default
    for arguments in (
        (x, weight, bias, None, residual, torch.zeros(4), torch.ones(4), *limits, None, None, None, 1, 1e-5, act),
        (x, weight, None, torch.rand(5, 3, 3) < 0.7, None, *[None] * 6, 3, 2, 1e-5, act),
    ):
        torch.library.opcheck(operation, arguments)


def test_tracking_and_evaluation_are_proper_operations_too() -> None:
    state = [torch.zeros(4), torch.ones(4), torch.tensor(0), torch.tensor(0)]
    moments = [torch.randn(2, 4), torch.rand(2, 4), torch.full((2, 1), 8.0)]
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(torch.ops.renorm.track.default, (*state, *moments, "std", 0.1, 1, 1e-5), test_utils=checks)
    arguments = (torch.randn(3, 4, 5), None, None, None, None, *state[:2], 0.5, 2, 1e-5, "gelu")
    torch.library.opcheck(torch.ops.renorm.evaluate.default, arguments, test_utils=checks)


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees(instructions: str) -> None:
    script = Path(__file__).with_name("instruction_sets.py")
    run = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"RENORM_CPU": instructions}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_kernels_can_be_turned_off() -> None:
    code = "from renorm.ops import backends; print(backends.available['cpu'])"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"RENORM_CPU": "off"}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "False", run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_a_hundred_million_elements_of_a_channel(channels_last: bool) -> None:
    x = torch.randn(100, 1, 1000, 1000) + 1e4
    if channels_last:
        x = x.reshape(10_000_000, 10)[:, :, None].expand(-1, -1, 1).contiguous()  # ten channels of ten million
    exact_var, exact_mean = torch.var_mean(x.double(), [0, *range(2, x.ndim)], correction=0)
    y, moments = functional.batch_norm(x)
    torch.testing.assert_close(moments.mean[0].double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(moments.var[0].double(), exact_var, rtol=1e-5, atol=0)
    mean, var = (moment.view(1, -1, *[1] * (x.ndim - 2)) for moment in (exact_mean, exact_var))
    assert float((y - ((x.double() - mean) / (var + 1e-5).sqrt()).float()).abs().max()) < 1e-5 * 6


def begins_elsewhere(x: Tensor) -> None:
    x[0] -= 1e4


def has_planes_that_begin_elsewhere(x: Tensor) -> None:
    x.flatten(2)[:, :, : x[0, 0].numel() // 2] -= 1e4


def is_in_order(x: Tensor) -> None:
    x.copy_(torch.linspace(-1e4, 1e4, x.numel(), dtype=x.dtype).view(x.shape))


def jumps(x: Tensor) -> None:
    x.copy_(x.sub(1e4).mul(1e-3))
    x[len(x) // 2 :] += 100


def is_constant_but_for_the_end(x: Tensor) -> None:
    x.fill_(0.1)
    x[-1] = 0.3


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("size", [(2, 2), (4, 4), (7, 7), (8, 8), (31, 33), (147, 147)], ids=str)
@pytest.mark.parametrize(
    "change", [None, begins_elsewhere, has_planes_that_begin_elsewhere, is_in_order, jumps, is_constant_but_for_the_end]
)
def test_moments_are_exact_wherever_the_first_elements_lie(
    change: Callable[[Tensor], None] | None, size: tuple[int, int], channels_last: bool
) -> None:
    wide = torch.randn(80, 3, *size, dtype=torch.float64) + 1e4
    if change is not None:
        change(wide)
    x = wide.float().contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    mask = torch.rand(80, *size) < 0.5
    for counted in (None, mask):
        _, moments = functional.batch_norm(x, mask=counted)
        kept = x.double().movedim(1, 0)[:, mask if counted is not None else torch.ones_like(mask)]
        var, mean = torch.var_mean(kept, 1, correction=0)
        torch.testing.assert_close(moments.var[0].double(), var, rtol=5e-6, atol=1e-12)
        error = (moments.mean[0] - mean).abs()
        assert bool((error <= 1e-7 * mean.abs() + 3e-6 * var.sqrt()).all())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", torch.ones(3)),
        ("running_mean", torch.ones(5)),
        ("mask", torch.ones(2, 6, dtype=torch.bool)),
        ("mask", torch.ones(2, 5)),
        ("residual", torch.ones(1, 4, 1)),
        ("r_max", torch.ones(2)),
        ("channels_per_group", 3),
        ("examples_per_group", 0),
    ],
)
def test_a_direct_call_with_a_wrong_size_is_refused(name: str, value: Any) -> None:
    arguments = {
        "x": torch.randn(2, 4, 5), "weight": None, "bias": None, "mask": None, "residual": None,
        "running_mean": torch.zeros(4), "running_var": torch.ones(4), "r_max": torch.ones(()), "d_max": torch.zeros(()),
        "r": None, "d": None, "examples_per_group": None, "channels_per_group": 1, "eps": 1e-5, "act": "none",
    }  # fmt: skip
    torch.ops.renorm.normalize_eager(**arguments)
    with pytest.raises(RuntimeError, match="shaped like x" if name == "residual" else name):
        torch.ops.renorm.normalize_eager(**arguments | {name: value})


def test_compiled_layers_contain_the_operation_once_per_direction() -> None:
    layer = nn.Sequential(renorm.BatchRenorm2d(4, act="relu"), renorm.BatchRenorm2d(4))
    torch._dynamo.reset()
    graphs = torch._dynamo.explain(layer)(torch.randn(4, 4, 3, 3)).graphs
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert calls.count("renorm.normalize.default") == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("options", [{}, {"channels_per_group": 2}], ids=["a channel", "two"])
def test_a_slope_that_jumps_is_the_same_in_every_backend(
    dtype: torch.dtype, act: Any, with_residual: bool, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(70, 16, 5) * 2
    near = renorm.BatchNorm1d(16, **options)(x).detach()
    residual = torch.where(torch.rand_like(x) < 0.5, 0.0, 6.0) - near  # so that all sums are near 0 or 6

    def gradient() -> torch.Tensor:
        given = x.to(dtype).requires_grad_(), residual.to(dtype).requires_grad_()
        layer = renorm.BatchNorm1d(16, act=act, bias=False, **options)
        layer(given[0], residual=given[1] if with_residual else None).sum().backward()
        wanted = given[1].grad if with_residual else layer.weight.grad
        assert wanted is not None
        return wanted

    by_kernels = gradient()
    monkeypatch.setitem(backends.available, "cpu", False)
    if with_residual:
        assert (gradient() != by_kernels).sum() <= 30  # of 5,600; some round otherwise, as sums have another order
    else:
        torch.testing.assert_close(gradient(), by_kernels, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (32, 3, 12, 12)], ids=str)
def test_means_are_far_nearer_than_the_output_rounds(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    errors = []
    for seed in range(100):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(memory_format=memory_format)
        layer = renorm.BatchNorm2d(shape[1], momentum=1.0)
        layer(x)
        errors.append((layer.running_mean.double() - x.double().mean((0, 2, 3))).abs().mean())
    assert torch.stack(errors).mean() < 2e-8  # standard deviations; float rounds numbers below 1 by 3e-8


def test_the_operations_refuse_a_batch_of_nothing() -> None:
    arguments = NormalizeArguments.of(Inputs(torch.empty(0, 3, 4)), Settings(Grouping(), 1e-5), None)
    with pytest.raises(RuntimeError, match="x must have elements"):
        torch.ops.renorm.normalize(*arguments)
