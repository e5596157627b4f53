"""convert(frozen=True): batch norm with fixed statistics and weights learns again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import renorm
from renorm import ConversionReport, convert


def torchvision_s() -> nn.Module:
    layer: nn.Module = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(8, eps=1e-3)
    return layer


def timm_s() -> nn.Module:
    layer: nn.Module = pytest.importorskip("timm.layers").FrozenBatchNormAct2d(8, act_layer=nn.SiLU)
    return layer


FROZEN = pytest.mark.parametrize("make", [torchvision_s, timm_s])
TARGETS = pytest.mark.parametrize(
    ("to", "options"),
    [
        (renorm.BatchNorm, {}),
        (renorm.BatchRenorm, {"limits": renorm.Limits.constant()}),
        (renorm.GhostBatchNorm, {"examples_per_group": 2}),
        (renorm.BatchGroupNorm, {"num_groups": 8}),
    ],
)


def filled(layer: nn.Module) -> Any:
    for name in ("weight", "bias", "running_mean"):
        nn.init.normal_(layer.get_buffer(name))
    layer.get_buffer("running_var").uniform_(1e-4, 2)
    return layer


@FROZEN
@TARGETS
def test_it_evaluates_as_before_and_its_weights_are_parameters(make: Any, to: Any, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), filled(make())).eval()
    x = torch.randn(4, 3, 7, 7)
    expected, statistics = model(x), (model[1].running_mean, model[1].running_var)
    drop, act = getattr(model[1], "drop", None), getattr(model[1], "act", None)
    reports: list[ConversionReport] = []
    layer = convert(model, to, frozen=True, report=reports.append, **options)[1]
    assert isinstance(layer, getattr(renorm, to.__name__ + "2d"))
    torch.testing.assert_close(model(x), expected)
    assert all(a is b for a, b in zip(statistics, (layer.running_mean, layer.running_var), strict=True))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert (getattr(layer, "drop", None), layer.act) == (drop, act)
    assert "weight and bias are parameters now, for an optimizer that is made afterwards" in str(reports[0])


@FROZEN
def test_it_learns_in_small_batches(make: Any) -> None:
    model = convert(nn.Sequential(filled(make())), renorm.BatchRenorm, limits=renorm.Limits.constant(), frozen=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 8, 3, 3)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@FROZEN
def test_its_state_dict_loads_after_conversion_and_it_goes_on_to_batch_norm(make: Any) -> None:
    state = filled(make()).state_dict()
    layer = convert(make(), renorm.BatchRenorm, frozen=True)
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, state["weight"])
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(renorm.to_batchnorm(layer.eval())(x), layer(x))


@FROZEN
def test_without_being_asked_for_it_is_named_with_the_option(make: Any) -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), make())
    kind = type(model[1]).__name__
    reason = r"its statistics and weights are meant to be fixed \(frozen=True converts it\)"
    with pytest.warns(UserWarning, match=f"1: {kind} left as it is, {reason}"):
        convert(model, renorm.BatchRenorm)
    assert type(model[1]).__name__ == kind


def test_a_subclass_stays_also_when_asked_for() -> None:
    class Mine(type(torchvision_s())):  # type: ignore[misc]
        pass

    with pytest.warns(UserWarning, match="0: Mine left as it is, its class is not known"):
        convert(nn.Sequential(Mine(8)), renorm.BatchRenorm, frozen=True)


def test_a_detector_s_backbone_converts() -> None:
    torchvision = pytest.importorskip("torchvision")
    backbone = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = backbone(x)
    reports: list[ConversionReport] = []
    convert(backbone, renorm.BatchRenorm, limits=renorm.Limits.constant(), frozen=True, report=reports.append)
    assert (len(reports[0].replaced), reports[0].passed_over) == (20, ())
    torch.testing.assert_close(backbone(x), expected)
