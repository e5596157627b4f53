"""Which parameters other people's optimizers decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from torch import nn

import renorm

from .helpers import converted, layers, network

YAML = {
    "nc": 3,
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C2f", [8, True]], [-1, 1, "Conv", [16, 3, 2]]],
    "head": [[[1, 2], 1, "Detect", ["nc"]]],
}


def of_norms(model: nn.Module, name: str) -> set[int]:
    kinds = (renorm.Norm, nn.modules.batchnorm._BatchNorm)
    return {id(getattr(module, name)) for module in model.modules() if isinstance(module, kinds)}


def decayed(groups: Iterable[dict[str, Any]]) -> set[int]:
    return {id(parameter) for group in groups if group["weight_decay"] > 0 for parameter in group["params"]}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "MuSGD"])
def test_ultralytics_decays_no_gamma(ultralytics: Any, optimizer: str) -> None:
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.nn.tasks import DetectionModel

    plain = DetectionModel(YAML, verbose=False)
    model = converted(plain)
    assert len(layers(model)) == len(of_norms(plain, "weight")) > 10
    trainer = BaseTrainer.__new__(BaseTrainer)
    groups = [trainer.build_optimizer(m, optimizer, decay=0.1).param_groups for m in (plain, model)]
    assert not decayed(groups[1]) & of_norms(model, "weight")
    sizes = [[(len(group["params"]), group["weight_decay"]) for group in which] for which in groups]
    assert sizes[1] == sizes[0]


def test_timm_decays_no_gamma() -> None:
    optim = pytest.importorskip("timm.optim")
    model = converted(network())
    groups = optim.param_groups_weight_decay(model, 0.1)
    assert not decayed(groups) & (of_norms(model, "weight") | of_norms(model, "bias"))
    assert decayed(groups) == {id(model[i].weight) for i in (0, 3, 8)}


def test_timm_s_optimizers_decay_no_gamma() -> None:
    optim = pytest.importorskip("timm.optim")
    model = converted(network())
    optimizer = optim.create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1)
    assert not decayed(optimizer.param_groups) & of_norms(model, "weight")


def test_torchvision_tells_norms_from_the_rest() -> None:
    utils = pytest.importorskip("torchvision.ops._utils")
    model = converted(network())
    norm, other = utils.split_normalization_params(model)
    assert {id(parameter) for parameter in norm} == of_norms(model, "weight") | of_norms(model, "bias")
    assert len(norm) + len(other) == len(list(model.parameters()))


def test_a_recipe_by_class_name_takes_another_name() -> None:
    model = converted(network())
    by_name = [m for m in model.modules() if "BatchNorm" in type(m).__name__]
    by_type = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    by_a_shorter_name = [m for m in model.modules() if type(m).__name__.startswith(("BatchNorm", "BatchRenorm"))]
    assert by_name == []
    assert by_type == by_a_shorter_name == layers(model)
