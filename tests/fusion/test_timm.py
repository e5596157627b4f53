"""timm's norm layer, which has an activation inside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import renorm
from fusion.helpers import Block, batch, check_same, fused, rows
from renorm import convert, to_batchnorm


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
