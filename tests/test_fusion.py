"""convert(fuse=True): what is fused computes the same, and what torch.fx does not prove is left as it is."""

from __future__ import annotations

import copy
import inspect
import io
import operator
import pickle
import random
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import renorm
from renorm import ConversionReport, convert, to_batchnorm
from renorm.activation import Activation
from renorm.lab.models import build_model

LIMITS = renorm.Limits.constant(r_max=1.5, d_max=0.5)
DOUBLE = {"dtype": torch.float64}


def converted(model: nn.Module, **options: Any) -> tuple[nn.Module, ConversionReport]:
    """A converted copy, and the report."""
    reports: list[ConversionReport] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing fused is what many tests are about
        model = convert(copy.deepcopy(model), renorm.BatchRenorm, limits=LIMITS, report=reports.append, **options)
    return model, reports[0]


def fused(model: nn.Module) -> nn.Module:
    return converted(model, fuse=True)[0]


def step(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """One training step without an optimizer: output, gradients of inputs and parameters, and buffers."""
    model.train().zero_grad()
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    torch.manual_seed(1)  # for dropout
    y = model(*(x * 1 for x in inputs))  # a leaf must not be changed in place
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = [x.grad for x in inputs] + [parameter.grad for parameter in model.parameters()]
    return [y.detach(), *(g for g in gradients if g is not None), *(b.clone() for b in model.buffers())]


def check_same(model: nn.Module, *inputs: Tensor, steps: int = 2) -> ConversionReport:
    """Compare the fused conversion with the unfused one: training steps, a training forward and evaluation."""
    (plain, _), (model, report) = converted(model), converted(model, fuse=True)
    for _ in range(steps):
        for expected, actual in zip(step(plain, inputs), step(model, inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for train in (True, False):
        outputs = []
        for either in (plain, model):
            torch.manual_seed(1)
            with torch.no_grad():
                outputs.append(either.train(train)(*(x.clone() for x in inputs)))
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    assert list(model.state_dict()) == list(plain.state_dict())
    return report


def rows(report: ConversionReport) -> list[tuple[str, bool, str | None]]:
    return [(row.name, row.adds, row.act) for row in report.fused]


def reasons(report: ConversionReport) -> dict[str, str]:
    return {row.name: row.reason for row in report.not_fused}


def batch(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 6, 5, 5)), **DOUBLE)


class Block(nn.Module):
    """Convolution and norm, and what `after` does with the layers, their output y, and the input x."""

    def __init__(self, after: Callable[[Any, Tensor, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, **DOUBLE)
        self.bn = nn.BatchNorm2d(6, **DOUBLE)
        self.relu = nn.ReLU()
        for name, module in modules.items():
            self.add_module(name, module)
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.bn(self.conv(x)), x)

    def scaled(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


# --- what is fused --------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[str, Any]] = {
    "nn.ReLU": ("relu", nn.ReLU()),
    "nn.ReLU in place": ("relu", nn.ReLU(inplace=True)),
    "nn.LeakyReLU": ("leaky_relu", nn.LeakyReLU()),
    "nn.SiLU": ("silu", nn.SiLU()),
    "nn.GELU": ("gelu", nn.GELU()),
    "F.relu": ("relu", F.relu),
    "F.relu in place": ("relu", lambda y: F.relu(y, inplace=True)),
    "F.relu in place by position": ("relu", lambda y: F.relu(y, True)),
    "F.relu_": ("relu", F.relu_),
    "torch.relu": ("relu", torch.relu),
    "torch.relu_": ("relu", torch.relu_),
    "Tensor.relu": ("relu", lambda y: y.relu()),
    "Tensor.relu_": ("relu", lambda y: y.relu_()),
    "F.leaky_relu": ("leaky_relu", F.leaky_relu),
    "F.leaky_relu with its default": ("leaky_relu", lambda y: F.leaky_relu(y, 0.01, inplace=True)),
    "F.silu": ("silu", F.silu),
    "F.silu in place": ("silu", lambda y: F.silu(y, inplace=True)),
    "F.gelu": ("gelu", F.gelu),
    "F.gelu with its default": ("gelu", lambda y: F.gelu(y, approximate="none")),
}
ADDS: dict[str, Callable[[Any, Any], Any]] = {
    "y + r": lambda y, r: y + r,
    "r + y": lambda y, r: r + y,
    "y += r": operator.iadd,
    "torch.add": torch.add,
    "torch.add with alpha 1": lambda y, r: torch.add(y, r, alpha=1),
    "Tensor.add": lambda y, r: y.add(r),
    "Tensor.add_": lambda y, r: y.add_(r),
}
activations = pytest.mark.parametrize(("name", "act"), ACTIVATIONS.values(), ids=ACTIVATIONS)
adds = pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)


def applied(act: Any) -> tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module]]:
    """How a block applies an activation, and the modules that it needs for it."""
    if isinstance(act, nn.Module):
        return lambda block, y: block.act(y), {"act": act}
    return lambda block, y: act(y), {}


@activations
def test_an_activation_is_fused(name: str, act: Any) -> None:
    apply, modules = applied(act)
    report = check_same(Block(lambda block, y, x: apply(block, y), **modules), batch())
    assert rows(report) == [("bn", False, name)]
    assert report.not_fused == ()


@activations
def test_a_residual_add_is_fused_with_the_activation_after_it(name: str, act: Any) -> None:
    apply, modules = applied(act)
    assert rows(check_same(Block(lambda block, y, x: apply(block, y + x), **modules), batch())) == [("bn", True, name)]


@adds
def test_every_form_of_a_residual_add_is_fused(add: Any) -> None:
    assert rows(check_same(Block(lambda block, y, x: block.relu(add(y, x))), batch())) == [("bn", True, "relu")]


@adds
def test_a_residual_add_is_fused_without_an_activation(add: Any) -> None:
    assert rows(check_same(Block(lambda block, y, x: add(y, x)), batch())) == [("bn", True, None)]
    report = check_same(Block(lambda block, y, x: torch.tanh(add(y, x))), batch())
    assert rows(report) == [("bn", True, None)]


@pytest.mark.parametrize("build", [lambda: nn.ReLU6(), lambda: nn.Hardswish()], ids=["ReLU6", "Hardswish"])
def test_an_activation_is_fused_as_soon_as_layers_have_it(build: Callable[[], nn.Module]) -> None:
    act = build()
    has_it = type(act).__name__.lower() in get_args(Activation)
    report = check_same(nn.Sequential(nn.BatchNorm2d(6, **DOUBLE), act), batch())
    assert bool(report.fused) == has_it
    assert has_it or reasons(report) == {"0": f"{type(act).__name__} follows"}


def test_a_sequential_keeps_its_modules_and_keys() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1)).double()
    assert rows(check_same(model, batch())) == [("1", False, "relu")]
    modules, keys = list(model), list(model.state_dict())
    convert(model, renorm.BatchRenorm, fuse=True)
    assert [model[i] is modules[i] for i in range(4)] == [True, False, True, True]
    assert list(model.state_dict()) == keys


def test_identities_between_are_passed_through() -> None:
    block = Block(lambda block, y, x: block.relu(block.nothing(block.nothing(y) + x)), nothing=nn.Identity())
    assert rows(check_same(block, batch())) == [("bn", True, "relu")]


def test_one_activation_module_may_follow_many_layers() -> None:
    def after(block: Any, y: Tensor, x: Tensor) -> Tensor:
        return block.relu(block.bn2(block.relu(y)) + x)

    report = check_same(Block(after, bn2=nn.BatchNorm2d(6, **DOUBLE)), batch())
    assert rows(report) == [("bn", False, "relu"), ("bn2", True, "relu")]


def test_a_layer_called_twice_is_fused_with_what_follows_each_call() -> None:
    report = check_same(Block(lambda block, y, x: F.silu(block.bn(block.relu(y))) + torch.tanh(block.bn(x))), batch())
    assert rows(report) == [("bn", False, "relu"), ("bn", False, "silu")]
    assert [row.reason for row in report.not_fused] == ["tanh follows"]


def test_a_block_that_is_used_twice_is_fused_once() -> None:
    block = Block(lambda block, y, x: block.relu(y + x))
    assert rows(check_same(nn.Sequential(block, block), batch())) == [("0.bn", True, "relu")]


def test_of_two_layers_that_are_added_the_later_one_adds() -> None:
    block = Block(lambda block, y, x: block.relu(y + block.bn2(x)), bn2=nn.BatchNorm2d(6, **DOUBLE))
    report = check_same(block, batch())
    assert rows(report) == [("bn2", True, "relu")]
    assert reasons(report) == {"bn": "it is the residual that another layer adds"}


def test_layers_in_a_list_are_fused_by_who_calls_them() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(2))
            self.norms = nn.ModuleDict({name: nn.BatchNorm2d(6) for name in "ab"})

        def forward(self, x: Tensor) -> Tensor:
            for conv, norm in zip(self.convs, self.norms.values(), strict=True):
                x = F.relu(norm(conv(x)))
            return x

    assert rows(check_same(Stack().double(), batch())) == [("norms.a", False, "relu"), ("norms.b", False, "relu")]


def test_one_dimensional_layers_are_fused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU()).double()
    assert rows(check_same(model, batch(5, 6))) == [("1", False, "gelu")]


@pytest.mark.parametrize(
    ("family", "options"),
    [("BatchNorm", {}), ("GhostBatchNorm", {"examples_per_group": 2}), ("BatchGroupNorm", {"num_groups": 3})],
)
def test_every_family_is_fused(family: str, options: dict[str, Any]) -> None:
    block = Block(lambda block, y, x: block.relu(y + x))
    models = [copy.deepcopy(block), copy.deepcopy(block)]
    for model, fuse in zip(models, (False, True), strict=True):
        convert(model, getattr(renorm, family), fuse=fuse, example_weight=0.2, **options)
    x = batch()
    for expected, actual in zip(*(step(model, (x,)) for model in models), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(models[1].eval()(x), models[0].eval()(x))


# --- what is not, and why -------------------------------------------------------------------------------------------


def in_place_on_other(block: Any, y: Tensor, x: Tensor) -> Tensor:
    other = block.conv(x)
    other += y
    return F.relu(other)


def used_before_in_place(block: Any, y: Tensor, x: Tensor) -> Tensor:
    z = y
    z += x
    return F.relu(y)  # z by another name


def input_changed_before_add(block: Any, y: Tensor, x: Tensor) -> Tensor:
    z = x * 2
    y = block.bn(z)
    z.mul_(3)
    return F.relu(y + z)


def other_call_before_add(block: Any, y: Tensor, x: Tensor) -> Tensor:
    first = block.bn(block.conv(x))
    second = torch.tanh(block.bn(block.conv(x + 1)))  # the order of the two matters
    return first + second


def statistics_read_before_add(block: Any, y: Tensor, x: Tensor) -> Tensor:
    first = block.bn(block.conv(x))
    return first + block.bn.running_mean.clone().sum()


UNFUSED: dict[str, tuple[Callable[[Any, Any, Any], Any], str]] = {
    "no activation": (lambda block, y, x: y, "its output leaves Block"),
    "another activation": (lambda block, y, x: F.softplus(y), "softplus follows"),
    "another function": (lambda block, y, x: y.flatten(1), "flatten follows"),
    "other slope": (lambda block, y, x: F.leaky_relu(y, 0.2), "leaky_relu follows"),
    "other slope by name": (lambda block, y, x: F.leaky_relu(y, negative_slope=0.2), "leaky_relu follows"),
    "other gelu": (lambda block, y, x: F.gelu(y, approximate="tanh"), "gelu follows"),
    "other slope in a module": (lambda block, y, x: block.leaky(y), "LeakyReLU follows"),
    "other gelu in a module": (lambda block, y, x: block.tanh_gelu(y), "GELU follows"),
    "subclass": (lambda block, y, x: block.shifted(y), "ShiftedReLU follows"),
    "pooling first": (lambda block, y, x: F.relu(block.pool(y)), "MaxPool2d follows"),
    "used twice": (lambda block, y, x: block.relu(y) + torch.tanh(y), "its output is used 2 times"),
    "returned too": (lambda block, y, x: (block.relu(y), y)[0] + 0 * y, "its output is used 2 times"),
    "never used": (lambda block, y, x: block.relu(x), "its output is not used"),
    "added to itself": (lambda block, y, x: block.relu(y + y), "no other tensor is added"),
    "number added": (lambda block, y, x: block.relu(y + 1), "no other tensor is added"),
    "added with a factor": (lambda block, y, x: torch.add(y, x, alpha=2), "its output is added with a factor"),
    "subtracted": (lambda block, y, x: block.relu(y - x), "sub follows"),
    "added into the other": (in_place_on_other, "its output is added in place to another tensor"),
    "by another name": (used_before_in_place, "its output is used 2 times"),
}


class ShiftedReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 1)


@pytest.mark.parametrize(("after", "reason"), UNFUSED.values(), ids=UNFUSED)
def test_what_differs_is_left_as_it_is(after: Any, reason: str) -> None:
    modules = {
        "leaky": nn.LeakyReLU(0.2), "tanh_gelu": nn.GELU("tanh"), "shifted": ShiftedReLU(), "pool": nn.MaxPool2d(2),
    }  # fmt: skip
    report = check_same(Block(after, **modules), batch())
    assert rows(report) == []
    assert reasons(report) == {"bn": reason}


@pytest.mark.parametrize("after", [input_changed_before_add, other_call_before_add])
def test_a_layer_does_not_wait_for_the_residual_if_that_may_change_its_result(after: Any) -> None:
    report = check_same(Block(after), batch(), steps=0)
    assert rows(report) == []
    reason = "what happens before the residual add may change its input or its statistics"
    assert reason in [row.reason for row in report.not_fused]


def test_a_layer_does_not_wait_until_its_statistics_are_read() -> None:
    report = check_same(Block(statistics_read_before_add), batch())
    assert rows(report) == []


def test_a_layer_waits_for_a_residual_that_is_computed_later() -> None:
    report = check_same(Block(lambda block, y, x: block.relu(y + block.shortcut(x)), shortcut=nn.Hardtanh()), batch())
    assert rows(report) == [("bn", True, "relu")]


def test_a_shortcut_with_the_same_layer_inside_keeps_the_order_of_calls() -> None:
    block = Block(lambda block, y, x: y + block.shortcut(x))
    block.add_module("shortcut", nn.Sequential(nn.Conv2d(6, 6, 1, **DOUBLE), block.bn))
    assert rows(check_same(block, batch())) == []


def test_a_layer_that_is_never_called_is_reported() -> None:
    report = check_same(Block(lambda block, y, x: block.relu(y), unused=nn.BatchNorm2d(6, **DOUBLE)), batch())
    assert rows(report) == [("bn", False, "relu")]
    assert reasons(report) == {"unused": "Block does not call it"}


@pytest.mark.parametrize("at", ["bn", "relu", "nothing"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_where_there_is_a_hook_nothing_is_fused(at: str, kind: str) -> None:
    block = Block(lambda block, y, x: block.relu(block.nothing(y)), nothing=nn.Identity())
    calls: list[int] = []
    getattr(block.get_submodule(at), f"register_{kind}_hook")(lambda *_: calls.append(1))
    model, report = converted(block, fuse=True)
    assert rows(report) == []
    step(model, (batch(),))
    assert len(calls) == 1


def test_hooks_on_the_block_itself_see_what_they_saw() -> None:
    block = Block(lambda block, y, x: block.relu(y + x))
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    model = fused(block)
    y = model(batch())
    assert len(seen) == 1
    assert seen[0] is y


class WithMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = renorm.BatchRenorm1d(6, **DOUBLE)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.relu(self.bn(x, mask))


def test_a_layer_that_is_called_with_a_mask_is_left_as_it_is() -> None:
    assert reasons(converted(WithMask(), fuse=True)[1]) == {"bn": "it is called with more than its input"}


# --- what torch.fx does not see -------------------------------------------------------------------------------------


def grad_off(block: Any, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = torch.tanh(y)
    return block.relu(block.bn2(y)) + z


def autocast_off(block: Any, y: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return block.relu(block.bn2(y))


def by_type(block: Any, y: Tensor, x: Tensor) -> Tensor:
    y = block.relu(block.bn2(y))
    return y if isinstance(x, Tensor) else 2 * y


def by_helper(block: Any, y: Tensor, x: Tensor) -> Tensor:
    return by_type(block, y, x)


def by_grad_mode(block: Any, y: Tensor, x: Tensor) -> Tensor:
    y = block.relu(block.bn2(y))
    return y if torch.is_grad_enabled() else 2 * y


def by_chance(block: Any, y: Tensor, x: Tensor) -> Tensor:
    y = block.relu(block.bn2(y))
    return y if random.random() < 0.5 else 2 * y


def by_torch_chance(block: Any, y: Tensor, x: Tensor) -> Tensor:
    y = block.relu(block.bn2(y))
    return y if torch.rand(()) < 0.5 else 2 * y


def by_value(block: Any, y: Tensor, x: Tensor) -> Tensor:
    y = block.relu(block.bn2(y))
    return y if y.sum() < 0.5 else 2 * y


def remembered(block: Any, y: Tensor, x: Tensor) -> Tensor:
    block.seen = block.relu(block.bn2(y))
    return block.seen


def collected(block: Any, y: Tensor, x: Tensor) -> Tensor:
    y = block.relu(block.bn2(y))
    block.outputs.append(y)
    return y


def checkpointed(block: Any, y: Tensor, x: Tensor) -> Tensor:
    y = torch.utils.checkpoint.checkpoint(torch.tanh, y, use_reentrant=False)
    return block.relu(block.bn2(y))


def made_into_a_dict(block: Any, y: Tensor, x: Tensor) -> OrderedDict[str, Tensor]:
    return OrderedDict(out=block.relu(block.bn2(y)))


def with_a_constant(block: Any, y: Tensor, x: Tensor) -> Tensor:
    return block.relu(block.bn2(y)) * torch.ones((), **DOUBLE)


def by_another_s_method(block: Any, y: Tensor, x: Tensor) -> Tensor:
    return block.relu(block.bn2(y)) + block.inner.scaled(x)


def around_its_forward(block: Any, y: Tensor, x: Tensor) -> Tensor:
    return block.inner.bn(y) + block.relu(block.bn2(y))


BLIND = [
    grad_off, autocast_off, by_type, by_helper, by_grad_mode, by_chance, by_torch_chance, by_value, remembered,
    collected, checkpointed, made_into_a_dict, with_a_constant, by_another_s_method,
    around_its_forward,
]  # fmt: skip


@pytest.mark.parametrize("after", BLIND, ids=lambda after: after.__name__)
def test_a_forward_that_a_trace_does_not_show_runs_as_it_is_written(after: Any) -> None:
    block = Block(after, bn2=nn.BatchNorm2d(6, **DOUBLE), inner=Block(lambda block, y, x: y))
    block.outputs = []
    numbers, torch_numbers = random.getstate(), torch.get_rng_state()
    model, report = converted(block, fuse=True)
    assert random.getstate() == numbers
    assert torch.equal(torch.get_rng_state(), torch_numbers)
    assert type(model) is Block
    assert rows(report) == []
    assert len(report.not_fused) == 3  # in both modes for one reason
    assert "Block" in reasons(report)["bn2"]
    assert model.outputs == []
    assert not hasattr(model, "seen")


def test_a_buffer_that_the_forward_changes_is_changed_by_every_call_and_by_nothing_else() -> None:
    def counted(block: Any, y: Tensor, x: Tensor) -> Tensor:
        block.calls.add_(1)
        return block.relu(y) * block.calls

    block = Block(counted)
    block.register_buffer("calls", torch.zeros((), **DOUBLE))
    assert rows(check_same(block, batch())) == [("bn", False, "relu")]
    model = fused(block)
    assert model.calls == 0
    model(batch())
    model(batch())
    assert model.calls == 2


def test_a_tensor_changed_in_place_is_changed_for_everybody() -> None:
    def changed(block: Any, y: Tensor, x: Tensor) -> Tensor:
        x += 1
        d = x.data
        d *= 2
        return block.relu(y) + x

    block = Block(changed)
    assert rows(check_same(block, batch(), steps=0)) == [("bn", False, "relu")]
    xs = [batch()]
    xs.append(xs[0].clone())
    for model, x in zip((converted(block)[0], fused(block)), xs, strict=True):
        with torch.no_grad():
            model.eval()(x)
    assert torch.equal(*xs)


# --- what changes later ---------------------------------------------------------------------------------------------


@pytest.fixture
def relu_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every nn.ReLU that is called, which fused ones are not."""
    calls: list[int] = []
    forward = nn.ReLU.forward

    def counting(self: nn.ReLU, x: Tensor) -> Tensor:
        calls.append(1)
        return forward(self, x)

    monkeypatch.setattr(nn.ReLU, "forward", counting)
    return calls


class Configured(nn.Module):
    """A block whose forward asks for much."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1, **DOUBLE)
        self.bn = nn.BatchNorm2d(6, **DOUBLE)
        self.relu = nn.ReLU()
        self.drop = nn.Identity()
        self.tail = nn.ModuleList([nn.Identity()])
        self.shortcut: nn.Module | None = None
        self.register_parameter("scale", None)
        self.factor = 1.0

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        y += x if self.shortcut is None else self.shortcut(x)
        y = self.relu(self.drop(y))
        if extra is not None:
            y = y + extra
        if self.scale is not None:
            y = y * self.scale
        for module in self.tail:
            y = module(y)
        return y * self.factor


def add_hook(model: Any) -> None:
    model.bn.register_forward_hook(lambda module, args, output: output * 2)


def add_hook_to_activation(model: Any) -> None:
    model.relu.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def set_factor(model: Any) -> None:
    model.factor = 3.0


def set_shortcut(model: Any) -> None:
    model.shortcut = nn.Hardtanh()


def set_parameter(model: Any) -> None:
    model.scale = nn.Parameter(torch.full((), 2.0, **DOUBLE))


def replace_identity(model: Any) -> None:
    model.drop = nn.Hardtanh()


def replace_activation(model: Any) -> None:
    model.relu = nn.Tanh()


def append_module(model: Any) -> None:
    model.tail.append(nn.Tanh())


def give_the_norm_an_activation(model: Any) -> None:
    model.bn.act = "silu"


def replace_the_norm(model: Any) -> None:
    model.bn = nn.Identity()


CHANGES = [
    add_hook, add_hook_to_activation, set_factor, set_shortcut, set_parameter, replace_identity, replace_activation,
    append_module, give_the_norm_an_activation, replace_the_norm,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_is_changed_later_does_what_it_then_says(change: Any) -> None:
    plain, model = converted(Configured())[0], fused(Configured())
    model.load_state_dict(plain.state_dict())
    x = batch()
    before = model(x)
    torch.testing.assert_close(before, plain(x))
    for either in (plain, model):
        change(either)
    assert not torch.allclose(model(x), before)
    plain(x)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("args", "kwargs", "calls"),
    [((1,), {}, 0), ((), {"x": 1}, 1), ((1, 1), {}, 1), ((1,), {"extra": 1}, 1), ((1, None), {}, 1)],
    ids=["as traced", "by name", "with an optional argument", "the same by name", "with a default"],
)
def test_other_arguments_run_the_forward_as_it_is_written(
    args: tuple[Any, ...], kwargs: dict[str, Any], calls: int, relu_calls: list[int]
) -> None:
    plain, model = converted(Configured())[0], fused(Configured())
    model.load_state_dict(plain.state_dict())
    x = batch()
    args = tuple(value and x for value in args)
    kwargs = dict.fromkeys(kwargs, x)
    actual = model(*args, **kwargs)
    assert len(relu_calls) == calls
    torch.testing.assert_close(actual, plain(*args, **kwargs))


def test_a_removed_hook_lets_the_block_be_fused_again(relu_calls: list[int]) -> None:
    model = fused(Configured())
    handle = model.relu.register_forward_hook(lambda *_: None)
    model(batch())
    assert len(relu_calls) == 1
    handle.remove()
    model(batch())
    assert len(relu_calls) == 1


def test_a_sequential_that_grows_or_is_cut_does_what_it_then_says() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()).double()
    convert(model, renorm.BatchRenorm, fuse=True)
    x = batch()
    expected = torch.relu(model[0](x))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model[:1](x), model[0](x))
    model.append(nn.Tanh())
    torch.testing.assert_close(model(x), torch.tanh(expected))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 6, 1, 1), torch.float64), ((6, 1, 1), torch.float64), ((4, 6, 5, 5), torch.float32)],
    ids=["broadcast", "fewer dimensions", "another dtype"],
)
def test_a_residual_that_is_broadcast_or_cast_is_added_as_the_model_says(
    shape: tuple[int, ...], dtype: torch.dtype, in_place: bool
) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(6, **DOUBLE)

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            y = self.bn(x)
            if in_place:
                y += r
            else:
                y = y + r
            return F.silu(y)

    assert rows(check_same(Two(), batch(), torch.randn(*shape, dtype=dtype))) == [("bn", True, "silu")]


@pytest.mark.parametrize(("add", "dtype"), [(operator.add, torch.float64), (operator.iadd, torch.float32)])
def test_a_wider_residual_promotes_the_output_unless_added_in_place(add: Any, dtype: torch.dtype) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return F.relu(add(self.bn(x), r))

    model, x, r = Two(), torch.randn(2, 6, 3, 3), batch(2, 6, 3, 3)
    expected = converted(model)[0](x, r)
    actual = fused(model)(x, r)
    assert actual.dtype == expected.dtype == dtype
    assert torch.equal(actual, expected)


def test_a_tensor_that_is_left_out_runs_the_forward_as_it_is_written() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(6, **DOUBLE)

        def forward(self, x: Tensor, r: Tensor | None) -> Tensor:
            y = F.relu(self.bn(x))
            return y if r is None else y * r

    model, x = fused(Optional()).eval(), batch()
    torch.testing.assert_close(model(x, 2 * torch.ones_like(x)), 2 * model(x, None))


def test_a_residual_that_does_not_fit_is_torch_s_own_error() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(6, **DOUBLE)

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return F.relu(self.bn(x) + r)

    with pytest.raises(RuntimeError, match="must match the size"):
        fused(Two())(batch(), batch(4, 6, 5, 3))


class PerMode(nn.Module):
    """A forward that depends on the mode, in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.BatchNorm2d(6, **DOUBLE) for _ in range(2))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.relu(self.a(x)), 0.5, self.training)
        y = self.b(x)
        return self.relu(y) if self.training else torch.tanh(y)


def test_a_forward_that_depends_on_the_mode_has_a_plan_for_each(relu_calls: list[int]) -> None:
    report = check_same(PerMode(), batch())
    assert [str(row) for row in report.fused] == ["a: fused with relu", "b: fused with relu, in training only"]
    assert [str(row) for row in report.not_fused] == ["b: not fused, tanh follows, at evaluation only"]
    relu_calls.clear()
    model = fused(PerMode())
    model.train()(batch())
    model.eval()(batch())
    assert relu_calls == []


# --- the state of a fused model -------------------------------------------------------------------------------------


def small() -> nn.Module:
    """A residual network, in double precision."""
    return build_model("resnet8", (3, 8, 8), 5, nn.BatchNorm2d).double()


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_is_fused_and_computes_the_same(copied: Any) -> None:
    model = convert(
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Tanh()).double(), renorm.BatchRenorm,
        limits=LIMITS, fuse=True,
    )  # fmt: skip
    reference, other = to_batchnorm(copy.deepcopy(model)), copied(model)
    assert type(other) is type(model)
    assert (other[1].weight is model[1].weight) == (copied is copy.copy)
    x = batch()
    expected = reference.eval()(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(nn.ReLU, "forward")  # fused, it is not called
        assert torch.equal(other.eval()(x), expected)
        other.train()(x)
    assert other[1].num_batches_tracked == 1


def test_parameters_and_layers_are_those_of_the_unfused_conversion() -> None:
    model = small()
    parameters, keys = [id(parameter) for parameter in model.parameters()], list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    convert(model, renorm.BatchRenorm, fuse=True)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert list(model.state_dict()) == keys
    for module, before in zip(model.modules(), classes, strict=True):
        assert isinstance(module, (before, renorm.Norm))


def test_a_fused_model_trains_with_an_optimizer_made_before() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert(model, renorm.BatchRenorm, limits=LIMITS, fuse=True)
    x, target = batch(8, 3, 8, 8), torch.arange(8) % 5
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_signature_of_the_forward_is_kept() -> None:
    assert list(inspect.signature(fused(Configured()).forward).parameters) == ["x", "extra"]


def test_back_to_batch_norm_undoes_the_fusion() -> None:
    model = small()
    text, keys = repr(model), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    convert(model, renorm.BatchNorm, fuse=True)
    step(model, (batch(4, 3, 8, 8),))
    x = batch(4, 3, 8, 8)
    expected = model.eval()(x)
    plain = to_batchnorm(model)
    assert [type(module) for module in plain.modules()] == classes
    assert repr(plain) == text
    assert list(plain.state_dict()) == keys
    assert not any("fused" in name for module in plain.modules() for name in vars(module))
    torch.testing.assert_close(plain(x), expected)


def test_a_refusal_to_go_back_leaves_the_fusion() -> None:
    model = convert(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()), renorm.BatchRenorm, fuse=True, example_weight=0.5)
    kind = type(model)
    with pytest.raises(ValueError, match=r"0: example_weight=0\.5"):
        to_batchnorm(model)
    assert type(model) is kind


def test_converting_in_two_parts_fuses_both() -> None:
    model, x = small(), batch(4, 3, 8, 8)
    expected = converted(model)[0](x)
    reports: list[ConversionReport] = []
    for where in (r"^[13]\b", r"^[45]\b"):
        convert(model, renorm.BatchRenorm, where=where, limits=LIMITS, fuse=True, report=reports.append)
        torch.manual_seed(0)
        if where == r"^[13]\b":
            assert torch.isfinite(model.eval()(x)).all()
            model.train()
    assert [len(report.fused) for report in reports] == [3, 7]
    torch.testing.assert_close(model(x), expected)


def test_without_fuse_nothing_changes_but_the_layers() -> None:
    model = small()
    classes = [type(module) for module in model.modules() if not isinstance(module, nn.BatchNorm2d)]
    reports: list[ConversionReport] = []
    convert(model, renorm.BatchRenorm, report=reports.append)
    assert [type(module) for module in model.modules() if not isinstance(module, renorm.Norm)] == classes
    assert reports[0].fused == reports[0].not_fused == ()
    assert str(reports[0]).startswith("7 layers replaced, 0 passed over\n")


def test_a_lone_layer_has_nothing_to_fuse() -> None:
    with pytest.warns(UserWarning, match="found nothing to fuse"):
        layer = convert(nn.BatchNorm2d(4), renorm.BatchRenorm, fuse=True)
    assert type(layer) is renorm.BatchRenorm2d


@pytest.mark.parametrize("reason", ["its class's", "copied or pickled", "takes", "no subclasses"])
def test_modules_with_ways_of_their_own_run_as_they_are_written(reason: str) -> None:
    class Own(nn.Sequential):
        if reason == "no subclasses":

            def __init_subclass__(cls) -> None:
                raise TypeError(reason)

        if reason == "copied or pickled":

            def __deepcopy__(self, memo: Any) -> Own:
                return self

        if reason == "takes":

            def forward(self, *args: Tensor) -> Any:
                return super().forward(*args)

    model = Own(nn.BatchNorm2d(6), nn.ReLU()).double()
    if reason == "its class's":
        forward = model.forward
        model.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    reports: list[ConversionReport] = []
    with pytest.warns(UserWarning, match="found nothing to fuse"):
        convert(model, renorm.BatchRenorm, fuse=True, report=reports.append)
    assert type(model) is Own
    assert reason in reasons(reports[0])["0"]
    assert model(batch()).shape == (4, 6, 5, 5)


def test_the_report_says_what_is_fused_and_what_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    convert(small(), renorm.BatchRenorm, fuse=True, report=print)
    text = capsys.readouterr().out
    assert text.startswith("7 layers replaced, 0 passed over, 7 calls fused, 0 not\n")
    assert "\n  3.norm1: fused with relu\n  3.norm2: fused with the residual add and relu\n" in text


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer, of Function
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_a_fused_model_compiles_without_graph_breaks() -> None:
    model, eager = fused(small()), fused(small())
    eager.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch(4, 3, 8, 8)
    for either in (eager, compiled):
        either(x).logsumexp(1).sum().backward()
    for expected, actual in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))


# --- timm's layer with an activation inside -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_layers() -> Any:
    return pytest.importorskip("timm.layers")


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU])
def test_timm_s_norm_applies_its_activation_itself(timm_layers: Any, act: type[nn.Module]) -> None:
    plain = timm_layers.BatchNormAct2d(6, act_layer=act, inplace=False).double()
    report = check_same(nn.Sequential(plain), batch())
    assert [(row.name, row.adds) for row in report.fused] == [("0", False)]
    model = fused(nn.Sequential(plain))
    assert type(model[0].act) is act
    assert type(model[0].drop) is nn.Identity
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(act, "forward", None)  # fused, it is not called
        model(batch())
        copy.deepcopy(model).eval()(batch())


def test_timm_s_norm_calls_what_layers_do_not_have(timm_layers: Any) -> None:
    layers = [
        timm_layers.BatchNormAct2d(6, act_layer=nn.Tanh, inplace=False),
        timm_layers.BatchNormAct2d(6, drop_layer=nn.Dropout2d),
        timm_layers.BatchNormAct2d(6, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.2}),
    ]
    layers.append(timm_layers.BatchNormAct2d(6))
    layers[-1].act.register_forward_hook(lambda *_: None)
    report = check_same(nn.Sequential(*layers).double(), batch())
    assert report.fused == ()
    assert [row.reason.split(" are not")[0] for row in report.not_fused] == [
        "its Identity and Tanh", "its Dropout2d and ReLU", "its Identity and LeakyReLU", "its Identity and ReLU",
    ]  # fmt: skip


def test_timm_s_norm_notices_what_changes_later(timm_layers: Any) -> None:
    layer = fused(nn.Sequential(timm_layers.BatchNormAct2d(6).double()))[0]
    x = batch()
    layer.eval()
    bare = copy.deepcopy(layer)
    bare.act = nn.Identity()
    torch.testing.assert_close(layer(x), torch.relu(bare(x)))
    layer.act = nn.Tanh()
    torch.testing.assert_close(layer(x), torch.tanh(bare(x)))
    layer.drop = nn.Hardtanh(-0.1, 0.1)
    torch.testing.assert_close(layer(x), torch.tanh(bare(x).clamp(-0.1, 0.1)))


def test_timm_s_norm_without_activation_adds_a_residual(timm_layers: Any) -> None:
    norm = timm_layers.BatchNormAct2d(6, apply_act=False).double()
    block = Block(lambda block, y, x: block.relu(block.norm(x) + x), norm=norm)
    assert rows(check_same(block, batch())) == [("norm", True, "relu")]


def test_timm_s_norm_goes_back_with_its_modules(timm_layers: Any) -> None:
    layer = timm_layers.BatchNormAct2d(6, act_layer=nn.SiLU)
    act = layer.act
    model = convert(nn.Sequential(layer), renorm.BatchRenorm, fuse=True)
    back = to_batchnorm(model)[0]
    assert type(back) is timm_layers.BatchNormAct2d
    assert back.act is act


# --- models that people have ----------------------------------------------------------------------------------------


def from_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("torchvision.models"), name)(**options)


def from_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name)


def from_lab(name: str) -> Callable[[], nn.Module]:
    norm = nn.BatchNorm1d if name == "mlp" else nn.BatchNorm2d
    return lambda: build_model(name, (3, 32, 32), 5, norm)


# Name, size of the images, and how often what is fused: (residual add?, activation) -> calls.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, dict[tuple[bool, str | None], int]]] = {
    "torchvision resnet18": (from_torchvision("resnet18"), 32, {(False, "relu"): 9, (True, "relu"): 8}),
    "torchvision inception_v3": (
        from_torchvision("inception_v3", init_weights=False, aux_logits=False), 75, {(False, "relu"): 94},
    ),
    "torchvision mobilenet_v2": (from_torchvision("mobilenet_v2"), 32, {(False, "relu6"): 35}),
    "torchvision mobilenet_v3_small": (from_torchvision("mobilenet_v3_small"), 32, {(False, "relu"): 5}),
    "timm resnet18": (from_timm("resnet18"), 32, {(False, "relu"): 9, (True, "relu"): 8}),
    "timm mobilenetv2_100": (from_timm("mobilenetv2_100"), 32, {(False, "relu6"): 35, (True, None): 10}),
    "timm efficientnet_b0": (from_timm("efficientnet_b0"), 64, {(False, "silu"): 33, (True, None): 9}),
    "timm mobilenetv3_small_100": (from_timm("mobilenetv3_small_100"), 32, {(False, "relu"): 5, (True, None): 6}),
    "lab resnet8": (from_lab("resnet8"), 32, {(False, "relu"): 4, (True, "relu"): 3}),
    "lab resnet20": (from_lab("resnet20"), 32, {(False, "relu"): 10, (True, "relu"): 9}),
    "lab mlp": (from_lab("mlp"), 32, {(False, "relu"): 4}),
}  # fmt: skip


@pytest.mark.parametrize(("build", "size", "expected"), MODELS.values(), ids=MODELS)
def test_a_model_computes_the_same_fused(
    build: Callable[[], nn.Module], size: int, expected: dict[tuple[bool, str | None], int]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        model = build().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)  # some models start residual branches at 0
    report = check_same(model, batch(2, 3, size, size))
    assert Counter((row.adds, row.act) for row in report.fused) == expected
    assert len(report.fused) + len(report.not_fused) == len(report.replaced)


def test_a_residual_network_says_what_is_left() -> None:
    report = converted(from_torchvision("resnet18")(), fuse=True)[1]
    assert set(reasons(report)) == {f"layer{i}.0.downsample.1" for i in (2, 3, 4)}
    assert set(reasons(report).values()) == {"its output leaves Sequential"}


def test_parts_of_a_fused_model_work_by_themselves() -> None:
    plain, model = converted(from_timm("resnet18")())[0].eval(), fused(from_timm("resnet18")()).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), plain.forward_features(x))
        expected = plain(x)
        model.set_grad_checkpointing(True)
        torch.testing.assert_close(model(x), expected)
        for either in (plain, model):
            either.reset_classifier(3)
        assert model(x).shape == (2, 3)
