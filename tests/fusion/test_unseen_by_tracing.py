"""Forwards whose meaning torch.fx does not see run as they are written."""

from __future__ import annotations

import gc
import random
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion.helpers import DOUBLE, Block, batch, check_same, converted, fused, reasons, rows


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


def test_code_that_garbage_collection_runs_while_tracing_is_not_taken_for_the_model_s() -> None:
    def finalizer(phase: str, info: dict[str, int]) -> None:
        hasattr(info, phase)

    thresholds = gc.get_threshold()
    gc.callbacks.append(finalizer)
    gc.set_threshold(1)
    try:
        report = converted(Block(lambda block, y, x: block.relu(y)), fuse=True)[1]
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(finalizer)
    assert rows(report) == [("bn", False, "relu")]
    assert report.not_fused == ()


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
