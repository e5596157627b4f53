"""Opacus, which cannot train with batch norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import renorm

from .helpers import converted, images, layers, network

opacus = pytest.importorskip("opacus")
pytestmark = pytest.mark.filterwarnings("ignore")  # opacus' own, of its random numbers and hooks


def make_private(model: nn.Module) -> Any:
    data = DataLoader(TensorDataset(images(32), torch.arange(32) % 4), 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return opacus.PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
    )


def test_layers_with_running_statistics_are_refused_by_name() -> None:
    model = converted(network())
    with pytest.raises(NotImplementedError, match=r"trainable layer with buffers.*\(1:BatchRenorm2d"):
        make_private(model)


def test_layers_without_running_statistics_are_refused_by_name() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(opacus.validators.errors.UnsupportedModuleError):
        make_private(plain)
    with pytest.raises(RuntimeError, match=r"gradients of single examples, and BatchNorm2d normalizes by all of them"):
        make_private(converted(plain, renorm.BatchNorm))


def test_the_validator_fixes_what_to_batchnorm_gives() -> None:
    model = converted(network())
    validator = opacus.validators.ModuleValidator
    assert validator.validate(model.train(), strict=False) == []  # it knows classes by their very type
    assert len(layers(validator.fix(model))) == 2
    plain = renorm.to_batchnorm(model)
    assert len(validator.validate(plain, strict=False)) == 2
    fixed = validator.fix(plain)
    assert not [module for module in fixed.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    make_private(fixed)
