"""A fused model that is changed later does what it then says."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import renorm
from fusion.helpers import DOUBLE, Configured, batch, check_same, converted, fused, rows
from renorm import convert


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
