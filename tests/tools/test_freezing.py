"""Tools that freeze batch norm: Lightning's is in test_lightning.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import renorm

from .helpers import converted, images, layers, moved, network

timm_utils = pytest.importorskip("timm.utils")
timm_layers = pytest.importorskip("timm.layers")


def test_timm_freezes_and_unfreezes_batch_norm_of_ours() -> None:
    plain = network()
    ours = converted(plain, renorm.BatchNorm)
    x = images()
    for model in (plain, ours):
        timm_layers.freeze_batch_norm_2d(model)
    assert not layers(ours)
    torch.testing.assert_close(ours(x), plain(x))
    for model in (plain, ours):
        timm_layers.unfreeze_batch_norm_2d(model)
        model(x)
    torch.testing.assert_close(ours.state_dict()["4.running_mean"], plain.state_dict()["4.running_mean"])


@pytest.mark.parametrize("freeze", [timm_layers.freeze_batch_norm_2d, timm_utils.freeze])
def test_timm_does_not_take_the_correction_away(freeze: object) -> None:
    model = converted(network())
    kinds = [type(module) for module in model]
    with pytest.raises(RuntimeError, match=r'set layer\.frozen = "running" instead'):
        freeze(model)  # type: ignore[operator]
    assert [type(module) for module in model] == kinds


def test_what_the_message_says_is_the_same() -> None:
    plain = network()
    ours = converted(plain)
    timm_layers.freeze_batch_norm_2d(plain)
    for layer in layers(ours):
        layer.frozen = "running"
    x = images()
    assert moved(ours, lambda: torch.testing.assert_close(ours.train()(x), plain.train()(x))) == 0


def test_timm_freezes_parameters_alone() -> None:
    model = converted(network())
    timm_utils.freeze(model, ["0", "1"], include_bn_running_stats=False)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained[0] == "3.weight"
    timm_utils.unfreeze(model, include_bn_running_stats=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(layers(model)) == 2


def test_the_usual_loop_over_batch_norms_freezes() -> None:
    model = converted(network()).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert moved(model, lambda: model(images() + 5)) == 0


def test_a_momentum_of_zero_freezes() -> None:
    model = converted(network()).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0
    assert moved(model, lambda: model(images() + 5)) == 0
