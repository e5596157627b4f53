"""What convert(fuse=True) leaves as it is, and the reason it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import renorm
from fusion.helpers import DOUBLE, Block, batch, check_same, converted, fused, reasons, rows, step


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


class WritesLater(nn.Module):
    """Changes in place, later or between, what a fused call keeps for its gradient and separate calls do not."""

    def __init__(self, act: str, what: str) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act, self.what = act, what

    def forward(self, x: Tensor) -> Tensor:
        residual = x * 1.0
        total = self.bn(self.conv(x)) + residual
        if self.what == "residual, between":
            residual.mul_(0.5)
        y: Tensor = getattr(F, self.act)(total)
        if self.what == "residual":
            residual.mul_(0.9)
        elif self.what == "a view of the residual":
            residual.view(residual.shape[0], -1).mul_(0.9)
        elif self.what == "output":
            y.mul_(0.9)
        elif self.what == "a view of the output":
            y[:, 1:].mul_(0.9)
        return y + residual


@pytest.mark.parametrize("what", [
    "residual, between", "residual", "a view of the residual", "output", "a view of the output",
])  # fmt: skip
@pytest.mark.parametrize("act", ["silu", "gelu", "relu", "relu6", "leaky_relu"])
def test_what_is_written_to_in_place_is_not_kept(act: str, what: str) -> None:
    if act == "relu" and "output" in what:
        pytest.skip("torch refuses it too")
    torch.manual_seed(0)
    model, reports = WritesLater(act, what), list[Any]()
    plain = renorm.convert(copy.deepcopy(model), renorm.BatchNorm)
    fused_model = renorm.convert(model, renorm.BatchNorm, fuse=True, report=reports.append)
    assert len(reports[0].fused) == 1
    found = []
    for model in (plain, fused_model):
        x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        value = y.detach().clone()
        y.square().sum().backward()
        found.append([value, x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
