"""Which constructors of torchvision and timm take a layer of ours as `norm_layer`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import renorm
from renorm.integrations import timm as integration
from renorm.integrations.timm import norm_act

LIMITS = renorm.Limits.over(1_000)
TORCHVISIONS = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf"]
FACTORIES = {"class": renorm.BatchRenorm2d, "partial": partial(renorm.BatchRenorm2d, limits=LIMITS)}


def counts(model: nn.Module) -> tuple[int, int]:
    ours = sum(isinstance(module, renorm.BatchRenorm2d) for module in model.modules())
    return ours, sum(isinstance(module, _BatchNorm) for module in model.modules()) - ours


@pytest.fixture(scope="module")
def timm() -> Any:
    return pytest.importorskip("timm")


@pytest.mark.parametrize("norm_layer", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("name", TORCHVISIONS)
def test_torchvision_takes_the_class_and_a_partial(name: str, norm_layer: Any) -> None:
    models = pytest.importorskip("torchvision.models")
    plain = models.get_model(name)
    if name == "mobilenet_v3_small":
        norm_layer = partial(norm_layer, eps=1e-3)  # the constructor's own is lost with its layer
    model = models.get_model(name, norm_layer=norm_layer)
    assert {m.eps for m in model.modules() if isinstance(m, renorm.Norm)} == {
        m.eps for m in plain.modules() if isinstance(m, _BatchNorm)
    }
    assert counts(model) == (counts(plain)[1], 0)
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("norm_layer", FACTORIES.values(), ids=FACTORIES)
def test_timm_s_resnets_take_the_class_and_a_partial(timm: Any, norm_layer: Any) -> None:
    plain, model = timm.create_model("test_resnet"), timm.create_model("test_resnet", norm_layer=norm_layer)
    assert counts(model) == (counts(plain)[1], 0)
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(("name", "act"), [("test_efficientnet", "silu"), ("regnetx_002", nn.ReLU)])
def test_timm_s_constructors_of_norm_and_activation_take_norm_act(timm: Any, name: str, act: Any) -> None:
    layer = norm_act(renorm.BatchRenorm2d, limits=LIMITS, act_layer=act)
    plain, model = timm.create_model(name), timm.create_model(name, norm_layer=layer)
    assert counts(model) == (counts(plain)[1], 0)
    assert {module.limits for module in model.modules() if isinstance(module, renorm.Norm)} == {LIMITS}
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_norm_act_makes_what_is_asked_for(timm: Any) -> None:
    make = norm_act(renorm.GhostBatchNorm2d, examples_per_group=4, eps=1e-3)
    layer = make(6, eps=0.1, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.3}, inplace=False)
    assert (layer.examples_per_group, layer.eps, layer.act.negative_slope) == (4, 0.1, 0.3)
    assert make(6, act_layer=nn.PReLU, inplace=None).act.weight.device.type == "cpu"
    assert type(make(6, apply_act=False).act) is nn.Identity
    assert type(make(6, drop_layer=nn.Dropout2d).drop) is nn.Dropout2d
    with pytest.raises(ValueError, match="layer must be one of BatchNorm, BatchNorm2d"):
        norm_act(renorm.BatchRenorm1d)


@pytest.mark.parametrize("family", ["BatchNorm", "BatchRenorm", "GhostBatchNorm", "BatchGroupNorm"])
def test_layers_with_an_activation_are_found_beside_their_constructor(family: str) -> None:
    name = f"{family}Act2d"
    assert name in integration.__all__
    assert getattr(integration, name).__name__ == name
