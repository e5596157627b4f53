"""Adaptation at test time: tools that collect batch norm layers and let them normalize by the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm

from .helpers import LIMITS, converted, images, layers, moved, network


def configure_model(model: nn.Module) -> nn.Module:
    """TENT's, line by line."""
    model.train()
    model.requires_grad_(False)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(True)
            m.track_running_stats = False
            m.running_mean = None
            m.running_var = None
    return model


def collect_params(model: nn.Module) -> tuple[list[nn.Parameter], list[str]]:
    """TENT's."""
    params, names = [], []
    for nm, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            for np, p in m.named_parameters():
                if np in ["weight", "bias"]:
                    params.append(p)
                    names.append(f"{nm}.{np}")
    return params, names


def softmax_entropy(x: Tensor) -> Tensor:
    return -(x.softmax(1) * x.log_softmax(1)).sum(1)


def adapt(model: nn.Module, x: Tensor, steps: int = 3) -> Tensor:
    """TENT's forward and adapt, with the state that it resets."""
    model = configure_model(model)
    params, _ = collect_params(model)
    optimizer = torch.optim.Adam(params, lr=1e-2)
    state = copy.deepcopy(model.state_dict())
    for _ in range(steps):
        outputs = model(x)
        softmax_entropy(outputs).mean(0).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.load_state_dict(state, strict=True)
    for _ in range(steps):
        outputs = model(x)
        softmax_entropy(outputs).mean(0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs


KINDS: dict[str, Any] = {
    "batch norm": (renorm.BatchNorm, {}),
    "batch renorm": (renorm.BatchRenorm, {"limits": LIMITS["constant"]}),
    "example weight": (renorm.BatchRenorm, {"limits": LIMITS["constant"], "example_weight": 0.1}),
    "fused": (renorm.BatchRenorm, {"fuse": True}),
}


@pytest.mark.parametrize(("to", "options"), KINDS.values(), ids=KINDS)
def test_tent_adapts_as_it_does_batch_norm(to: Any, options: Any) -> None:
    plain = network()
    ours = converted(plain, to, **options)
    assert collect_params(ours)[1] == ["1.weight", "1.bias", "4.weight", "4.bias"]
    x = images(64) * 3 + 1
    torch.testing.assert_close(adapt(ours, x), adapt(plain, x))
    before = (network()[1].weight, network()[1].bias)
    assert not torch.equal(ours[1].weight, before[0])
    torch.testing.assert_close(ours[1].weight, plain[1].weight)


def test_without_running_statistics_evaluation_goes_by_the_batch_too() -> None:
    ours = configure_model(converted(network()))
    x = images()
    torch.testing.assert_close(ours.eval()(x), ours.train()(x))


def to_batch_norm(model: nn.Module) -> nn.Module:
    return renorm.convert(renorm.to_batchnorm(model), renorm.BatchNorm)


def without_limits(model: nn.Module) -> nn.Module:
    for layer in layers(model):
        layer.limits = None
    return model


@pytest.mark.parametrize("make", [to_batch_norm, without_limits, configure_model])
def test_batch_statistics_of_batch_renorm_want_the_limits_off(make: Callable[[nn.Module], nn.Module]) -> None:
    plain = network()
    model = converted(plain, limits=renorm.Limits.constant())
    x = images(64) * 1.5 + 0.5
    expected = copy.deepcopy(plain).train()(x)
    evaluated = copy.deepcopy(model).eval()(x)
    with renorm.freeze(model):
        corrected = model.train()(x)
    torch.testing.assert_close(corrected, evaluated)
    assert (evaluated - expected).abs().max() > 0.1
    made = make(model)
    with renorm.freeze(made):
        torch.testing.assert_close(made.train()(x), expected)


def test_torch_func_replaces_running_statistics() -> None:
    plain, x = network(), images()
    ours = converted(plain)
    for model in (plain, ours):
        torch.func.replace_all_batch_norm_modules_(model)
        assert not dict(model.named_buffers()).keys() & {"1.running_mean", "1.running_var"}
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("to", [renorm.BatchNorm, renorm.BatchRenorm])
def test_statistics_move_to_a_stream_of_other_data(to: Any) -> None:
    """Adaptive batch norm: statistics of the target, by forwards in training mode with a larger momentum."""
    model = converted(network(), to).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    assert moved(model, lambda: [model(images() + 3) for _ in range(10)]) > 0.5
    expected = renorm.estimate(copy.deepcopy(model), [images() + 3 for _ in range(10)])
    assert (model[1].running_mean - expected[1].running_mean).abs().max() < 0.3
