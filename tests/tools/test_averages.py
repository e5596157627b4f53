"""Averages of weights that hold buffers, too; Lightning's are in tests/integrations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import renorm

from .helpers import converted, images, network


def of_torch(model: nn.Module) -> Any:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    return average.update_parameters, average.module


def of_timm(model: nn.Module) -> Any:
    average = pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.5)
    return average.update, average.module


def of_ultralytics(model: nn.Module) -> Any:
    from ultralytics.utils.torch_utils import ModelEMA

    average = ModelEMA(model, decay=0.5, tau=1)
    return average.update, average.ema


@pytest.mark.usefixtures("ultralytics")
@pytest.mark.parametrize("make", [of_torch, of_timm, of_ultralytics])
def test_averages_are_those_of_torch_s_layers(make: Any) -> None:
    plain = network()
    ours = converted(plain, renorm.BatchNorm)
    averages = []
    for model in (plain, ours):
        torch.manual_seed(1)
        update, average = make(model)
        for _ in range(3):
            model.train()(images() + 3)
            update(model)
        averages.append(average)
    torch.testing.assert_close(averages[1].state_dict(), averages[0].state_dict())
    assert not torch.equal(averages[1][1].running_mean, ours[1].running_mean)
