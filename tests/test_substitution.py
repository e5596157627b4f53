"""Tools that would lose what a layer does are refused; what reads a layer otherwise is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import renorm

WEIGHED = {"example_weight": 0.3}


@pytest.mark.parametrize("name", ["convert_sync_batchnorm", "convert_syncbn_model", "revert_sync_batchnorm"])
@pytest.mark.parametrize("layer", [renorm.BatchNorm2d(4), renorm.BatchRenorm2d(4)], ids=repr)
def test_who_synchronizes_is_told_of_synchronize(name: str, layer: Any) -> None:
    with pytest.raises(RuntimeError, match=r"renorm\.synchronize"):
        reader(name)(layer)


def test_torchs_own_converter_is_refused_before_it_changes_a_layer() -> None:
    model = nn.Sequential(renorm.BatchRenorm2d(4))
    with pytest.raises(RuntimeError, match="convert_sync_batchnorm would replace BatchRenorm2d"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is renorm.BatchRenorm2d


@pytest.mark.parametrize("name", ["freeze_batch_norm_2d", "convert_frozen_batchnorm"])
def test_who_freezes_for_good_is_refused_where_it_would_lose_something(name: str) -> None:
    assert reader(name)(renorm.BatchNorm2d(4)) == 1e-5
    for layer in (renorm.BatchRenorm2d(4), renorm.GhostBatchNorm2d(4, 2), renorm.BatchNorm2d(4, act="relu")):
        with pytest.raises(RuntimeError, match=r"layer\.frozen"):
            reader(name)(layer)


@pytest.mark.parametrize("options", [WEIGHED, {"act": "relu"}, {"channels_per_group": 2}], ids=str)
def test_folding_is_refused_where_scale_and_shift_do_not_do(options: dict[str, Any]) -> None:
    layer = renorm.BatchNorm2d(4, **options).eval()
    with pytest.raises(RuntimeError, match="fuse_conv_bn_eval takes BatchNorm2d for a scale and a shift"):
        fuse_conv_bn_eval(nn.Conv2d(3, 4, 1).eval(), layer)


def test_folding_is_exact_where_they_do() -> None:
    conv, layer = nn.Conv2d(3, 4, 1), renorm.BatchRenorm2d(4, limits=renorm.Limits.constant())
    x = torch.randn(8, 3, 5, 5)
    for _ in range(3):
        layer(conv(x))
    expected = layer.eval()(conv.eval()(x))
    torch.testing.assert_close(fuse_conv_bn_eval(conv, layer)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["read", "test_fuse_bn", "fuse", "convert", "synchronize"])
def test_other_readers_are_let(name: str) -> None:
    assert reader(name)(renorm.BatchRenorm2d(4, **WEIGHED)) == 1e-5


def test_a_subclass_computes_by_its_own_attributes() -> None:
    class Own(renorm.BatchGroupNorm1d):
        def forward(self, input: torch.Tensor, *_: Any) -> torch.Tensor:
            scale = self.weight / (self.running_var + self.eps).sqrt()
            return (input - self.running_mean) * scale

    x = torch.randn(3, 4)
    torch.testing.assert_close(Own(4, 2)(x), x, rtol=1e-4, atol=1e-4)


LOSES = renorm.BatchRenorm2d(4), renorm.BatchNorm2d(4, example_weight=0.3), renorm.GhostBatchNorm2d(4, 2)


def as_nni(bn: Any) -> nn.Module:
    return nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats)


def as_maskrcnn(bn: Any) -> nn.Module:
    return nn.BatchNorm2d(bn.num_features, eps=bn.eps)


def as_clone(bn: Any) -> nn.Module:
    clone: nn.Module = type(bn)(8, eps=bn.eps, momentum=bn.momentum)
    return clone


@pytest.mark.parametrize("layer", LOSES, ids=repr)
@pytest.mark.parametrize("replace", [as_nni, as_maskrcnn, as_clone])
def test_replacing_is_told_by_few_attributes(replace: Callable[[Any], nn.Module], layer: Any) -> None:
    with pytest.raises(RuntimeError, match=f"{replace.__name__} would replace"):
        replace(layer)
    if replace is not as_clone:
        replace(renorm.BatchNorm2d(4))


def test_numbers_handed_to_torchs_function_are_refused_where_it_does_something_else() -> None:
    def forward(bn: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps
        )

    x = torch.randn(8, 4, 3, 3)
    with pytest.raises(RuntimeError, match="calls torch's batch_norm with the numbers of BatchRenorm2d"):
        forward(renorm.BatchRenorm2d(4), x)
    torch.testing.assert_close(forward(renorm.BatchNorm2d(4), x), nn.BatchNorm2d(4)(x))


@pytest.mark.parametrize("patched", [nn.modules.batchnorm._BatchNorm, nn.BatchNorm2d])
def test_a_replaced_forward_of_torchs_is_not_passed_over_in_silence(
    patched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = renorm.BatchRenorm2d(4), torch.randn(2, 4, 3, 3)
    before = patched.forward

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = before(self, input)
        return output + 1

    monkeypatch.setattr(patched, "forward", forward)
    with pytest.warns(UserWarning, match=r"forward was replaced, and BatchRenorm2d does not call it"):
        layer.eval()(x)


def test_eps_can_be_set() -> None:
    layer = renorm.BatchNorm1d(3)
    layer.eps = 0.5
    x = torch.randn(8, 3)
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(3, eps=0.5)(x))


def reader(name: str) -> Callable[[Any], Any]:
    """A function of this name that reads eps, as a tool would."""
    namespace: dict[str, Any] = {}
    exec(f"def {name}(layer): return layer.eps", namespace)
    found: Callable[[Any], Any] = namespace[name]
    return found
