"""Tools that take running statistics anew: torch's update_bn, fvcore's precise batch norm, Lightning's SWA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import renorm

from .helpers import LIMITS, converted, images, layers, network, statistics

BATCHES = 20
FAMILIES = {
    "batch norm": (renorm.BatchNorm, {}),
    "constant limits": (renorm.BatchRenorm, {"limits": LIMITS["constant"]}),
    "ramps": (renorm.BatchRenorm, {"limits": LIMITS["ramps"]}),
    "ghosts": (renorm.GhostBatchNorm, {"examples_per_group": 8}),
}
families = pytest.mark.parametrize(("to", "options"), FAMILIES.values(), ids=FAMILIES)


def by_torch(model: nn.Module, data: Tensor) -> None:
    update_bn(data.split(16), model)


def by_fvcore(model: nn.Module, data: Tensor) -> None:
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    precise_bn.update_bn_stats(model.train(), data.split(16), num_iters=BATCHES)


def by_a_wrapper(model: nn.Module, data: Tensor) -> None:
    average = AveragedModel(model)
    update_bn(data.split(16), average)
    model.load_state_dict(average.module.state_dict())


TOOLS = {"torch": by_torch, "fvcore": by_fvcore, "averaged": by_a_wrapper}


def trained_elsewhere(model: Any) -> Any:
    """Weights that the statistics do not belong to, so that a correction towards them would show."""
    for module in model:
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 3
    return model


def assert_estimated(model: nn.Module, estimated: nn.Module) -> None:
    """Equal but for what remains: averages of the batches' variances, each about the batch's own mean."""
    found, expected = statistics(model), statistics(estimated)
    for name, mean in expected.items():
        if "running_mean" in name:
            var = expected[name.replace("mean", "var")]
            assert float(((found[name] - mean) / var.sqrt()).abs().max()) < 0.02, name
        else:
            assert float((found[name] / mean).log().abs().max()) < 0.08, name


@families
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_statistics_are_those_of_estimate(tool: Callable[[nn.Module, Tensor], None], to: Any, options: Any) -> None:
    model = trained_elsewhere(converted(network(), to, **options))
    data = images(16 * BATCHES)
    estimated = renorm.estimate(copy.deepcopy(model), data.split(16))
    tool(model, data)
    assert_estimated(model, estimated)


@families
def test_afterwards_the_layers_are_as_they_were(to: Any, options: Any) -> None:
    model = converted(network(), to, **options)
    settings = [(layer.momentum, layer.limits, layer.estimates) for layer in layers(model)]
    by_torch(model, images(16 * BATCHES))
    assert [(layer.momentum, layer.limits, layer.estimates) for layer in layers(model)] == settings
    assert [int(layer.num_batches_tracked) for layer in layers(model)] == [BATCHES, BATCHES]


def test_batch_norm_of_ours_gets_torch_s_very_numbers() -> None:
    plain, data = network(), images(16 * BATCHES)
    ours = converted(plain, renorm.BatchNorm)
    for model in (plain, ours):
        by_torch(model, data)
    torch.testing.assert_close(statistics(ours), statistics(plain))


def test_a_cumulative_average_is_better_estimated() -> None:
    """Of a layer made with momentum=None nobody can tell that its statistics are taken anew."""
    model = trained_elsewhere(converted(network(), momentum=None, limits=LIMITS["constant"]))
    data = images(16 * BATCHES)
    estimated = renorm.estimate(copy.deepcopy(model), data.split(16))
    by_torch(model, data)
    with pytest.raises(AssertionError):
        assert_estimated(model, estimated)
