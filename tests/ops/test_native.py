"""A layer's step past torch's dispatcher: as by the registered operations, and never where that would be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import renorm
from renorm.ops import dispatch, native

pytestmark = pytest.mark.usefixtures("kernels")


class Watching(TorchDispatchMode):
    """Sees every operation, so that nothing may go past the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls past the dispatcher."""
    made: list[str] = []
    for name in ("_step", "_step_backward"):
        function = getattr(native, name)

        def call(*arguments: Any, function: Any = function, name: str = name) -> Any:
            made.append(name)
            return function(*arguments)

        monkeypatch.setattr(native, name, call)
    yield made
    dispatch._kinds.clear()


def train(layer: renorm.Norm, x: Tensor, watched: bool = False, **options: Any) -> list[Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    with Watching() if watched else nullcontext():
        y = layer(x, **options)
        y.float().sin().sum().backward()
    assert x.grad is not None
    gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *gradients, *(b.clone() for b in layer.buffers())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "neither"])
@pytest.mark.parametrize("options", [{}, {"examples_per_group": 2, "channels_per_group": 2, "act": "relu"}])
@pytest.mark.parametrize("extras", [(), ("mask", "residual")], ids=["alone", "mask and residual"])
def test_it_is_what_the_registered_operations_do(
    dtype: torch.dtype, layout: str, options: Any, extras: tuple[str, ...], steps: list[str]
) -> None:
    torch.manual_seed(0)
    layers = [
        renorm.BatchRenorm2d(4, dtype=dtype, limits=renorm.Limits(2.0, 1.0, start=1, r_end=3, d_end=2), **options)
        for _ in range(2)
    ]
    for _ in range(4):
        x = torch.randn(6, 4, 3, 5, dtype=dtype) * 2 + 1
        if layout == "channels last":
            x = x.to(memory_format=torch.channels_last)
        elif layout == "neither":
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        given = {"mask": torch.rand(6, 3, 5) > 0.3, "residual": torch.randn(6, 4, 3, 5, dtype=dtype)}
        given = {name: given[name] for name in extras}
        one, other = train(layers[0], x, **given), train(layers[1], x, watched=True, **given)
        for ours, expected in zip(one, other, strict=True):
            assert torch.equal(ours, expected)
    assert steps == ["_step", "_step_backward"] * 4


def test_a_mode_sees_the_operations(steps: list[str]) -> None:
    layer, x = renorm.BatchNorm1d(3), torch.randn(8, 3, requires_grad=True)
    with Watching() as mode:
        layer(x).sum().backward()
    assert {"renorm::normalize_eager", "renorm::normalize_backward", "renorm::track"} <= mode.seen
    assert steps == []
    y = layer(x)
    with Watching() as mode:
        y.sum().backward()
    assert "renorm::normalize_backward" in mode.seen
    assert steps == ["_step"]


@pytest.mark.parametrize("change", ["dtype", "shape", "layout", "parameter"])
def test_what_is_exchanged_under_a_layer_is_noticed(change: str, steps: list[str]) -> None:
    layer, x = renorm.BatchNorm1d(4), torch.randn(8, 4)
    layer(x)
    if change == "dtype":
        layer.running_mean.data = layer.running_mean.data.double()
        layer.running_var.data = layer.running_var.data.double()
    elif change == "shape":
        layer.running_mean.data = torch.zeros(3)
        with pytest.raises(ValueError, match="running_mean"):
            layer(x)
        return
    elif change == "layout":
        layer.running_mean.data = torch.zeros(8)[::2]
    else:
        layer.weight = torch.nn.Parameter(torch.ones(4).as_subclass(type("Subclass", (Tensor,), {})))  # type: ignore[arg-type]
    expected = torch.nn.BatchNorm1d(4, dtype=torch.float64)
    before, batch = layer.running_mean.double().clone(), x.double().mean(0)
    torch.testing.assert_close(layer(x).double(), expected(x.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_mean.double(), 0.9 * before + 0.1 * batch, rtol=1e-5, atol=1e-5)
    assert steps == ["_step"]


def test_what_a_hook_saves_in_another_layout_is_read_right(steps: list[str]) -> None:
    layer, x = renorm.BatchNorm2d(3), torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last)
    expected = train(layer, x)[:4]
    layer.reset_running_stats()
    with saved_tensors_hooks(lambda tensor: tensor.contiguous(), lambda tensor: tensor):
        found = train(layer, x)[:4]
    assert len(steps) == 4
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize(
    "changed",
    [
        lambda t: t.bfloat16() if t.ndim == 4 else t,
        lambda t: t.double(),
        lambda t: t[:1].clone(),
        lambda t: t.half() if t.ndim == 1 else t,  # what the kernels keep, weights being as good in any dtype
    ],
    ids=["x in bfloat16", "all in float64", "less of all", "what is kept"],
)
def test_what_a_hook_saves_otherwise_is_refused(changed: Any) -> None:
    layer, x = renorm.BatchNorm2d(64), torch.randn(32, 64, 7, 7, requires_grad=True)
    with saved_tensors_hooks(changed, lambda tensor: tensor):
        y = layer(x)
    with pytest.raises(RuntimeError, match="a tensor saved for the backward must have"):
        y.backward(torch.randn_like(y))


def test_data_set_between_forward_and_backward_is_refused() -> None:
    layer, x = renorm.BatchNorm2d(64), torch.randn(32, 64, 7, 7, requires_grad=True)
    y = layer(x)
    layer.weight.data = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"must have 64 elements, .* of shape \(2,\)"):
        y.sum().backward()


def test_views_that_say_the_negative_of_their_memory_are_read_so() -> None:
    layer, other = renorm.BatchNorm1d(3, act="relu"), torch.nn.BatchNorm1d(3)
    x, residual = (torch._neg_view(torch.randn(8, 3)) for _ in range(2))
    torch.testing.assert_close(layer(x, residual=residual), torch.relu(other(x) + residual))


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_so_are_parameters_and_statistics(name: str) -> None:
    layers = [renorm.BatchRenorm1d(3, limits=renorm.Limits.constant(2.0, 1.0)) for _ in range(2)]
    values, x = torch.tensor([0.5, 2.0, 1.5]), torch.randn(8, 3)
    for layer, negative in zip(layers, (False, True), strict=True):
        layer(x)  # of a kind that is known
        layer.reset_running_stats()
        getattr(layer, name).data = torch._neg_view(-values) if negative else values.clone()
    for ours, expected in zip(train(layers[1], x), train(layers[0], x), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_counter_of_nothing_is_no_memory_to_count_in() -> None:
    layer = renorm.BatchNorm1d(3)
    layer.num_batches_tracked = torch.zeros(0, dtype=torch.int64)
    assert layer(torch.randn(8, 3)).isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu", "silu", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_depend_on_whether_the_residual_wants_one(
    layout: torch.memory_format, act: Any, dtype: torch.dtype
) -> None:
    layer = renorm.BatchNorm2d(6, act=act)
    x, residual = (torch.randn(9, 6, 5, 7).to(dtype, memory_format=layout) for _ in range(2))
    alone = train(layer, x, residual=residual)
    layer.reset_running_stats()
    both = train(layer, x, residual=residual.clone().requires_grad_())
    for ours, expected in zip(both, alone, strict=True):
        assert torch.equal(ours, expected)


def test_mkldnn_trains_as_nn_batch_norm_does() -> None:
    layer, other, x = renorm.BatchNorm2d(3), torch.nn.BatchNorm2d(3), torch.randn(4, 3, 5, 2)
    y = layer(x.to_mkldnn())
    assert y.layout == torch._mkldnn  # type: ignore[attr-defined]
    torch.testing.assert_close(y.to_dense(), other(x))
    torch.testing.assert_close(layer.running_var, other.running_var)
