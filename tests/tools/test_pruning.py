"""Tools that take channels out, or set weights to zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import renorm

from .helpers import LIMITS, converted, images, layers, network

KINDS: dict[str, Any] = {
    "batch norm": (renorm.BatchNorm, {}),
    "batch renorm": (renorm.BatchRenorm, {"limits": LIMITS["constant"]}),
    "ghosts": (renorm.GhostBatchNorm, {"examples_per_group": 2}),
    "fused": (renorm.BatchNorm, {"fuse": True}),
}


def resnet() -> Any:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    return model


def prune_half(model: Any, x: Tensor) -> None:
    torch_pruning = pytest.importorskip("torch_pruning")
    torch_pruning.pruner.MagnitudePruner(
        model,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
    ).step()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch-pruning's
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("to", "options"), KINDS.values(), ids=KINDS)
def test_channels_are_taken_out_as_of_torch_s_layers(to: Any, options: Any, training: bool) -> None:
    plain, x = resnet(), torch.randn(4, 3, 32, 32)
    ours = converted(plain, to, **options)
    for model in (plain, ours):
        prune_half(model.train(training), x)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    assert [layer.num_features for layer in layers(ours)][:3] == [32, 32, 32]
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
    ours.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


@pytest.mark.filterwarnings("ignore")
def test_channels_that_share_statistics_are_not_taken_apart() -> None:
    model = converted(resnet(), renorm.BatchGroupNorm, num_groups=8)
    with pytest.raises(ValueError, match=r"num_features must stay \d+, since \d+ consecutive channels share"):
        prune_half(model, torch.randn(4, 3, 32, 32))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_torch_s_pruning_of_gamma_is_that_of_torch_s_layer(training: bool) -> None:
    plain = network()
    ours = converted(plain, renorm.BatchNorm)
    x = images()
    for model in (plain, ours):
        prune.l1_unstructured(model[1], "weight", 0.5)
    torch.testing.assert_close(ours.train(training)(x), plain.train(training)(x))
    expected = ours.eval()(x)
    prune.remove(ours[1], "weight")
    assert (ours[1].weight == 0).sum() == 4
    torch.testing.assert_close(ours(x), expected)


def test_torch_s_parametrizations_of_gamma_are_used() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    plain = network()
    ours = converted(plain)
    x = images()
    for model in (plain, ours):
        nn.utils.parametrize.register_parametrization(model[1], "weight", Doubled())
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
    assert len(layers(ours)) == 2
