"""torch.ao.quantization and torchao: what is around our layers, and these after `to_batchnorm`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import renorm

from .helpers import converted, images, layers, network
from .test_replacing import MORE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def eager(model: nn.Module) -> nn.Module:
    torch.ao.quantization.fuse_modules(model.eval(), ["0", "1", "2"], inplace=True)
    return model


def eager_training(model: nn.Module) -> nn.Module:
    torch.ao.quantization.fuse_modules_qat(model.train(), ["0", "1", "2"], inplace=True)
    return model


@pytest.mark.parametrize("fuse", [eager, eager_training])
def test_eager_mode_takes_torch_s_layers(fuse: Callable[[nn.Module], nn.Module]) -> None:
    model = converted(network())
    with pytest.raises((AssertionError, NotImplementedError), match=r"BatchRenorm2d"):
        fuse(copy.deepcopy(model))
    fuse(renorm.to_batchnorm(model))


@pytest.mark.parametrize("options", [{}, *MORE.values()], ids=["plain", *MORE])
def test_graph_mode_quantizes_what_is_around_the_layers(options: dict[str, Any]) -> None:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    model, x = converted(network(), **options).eval(), images(64)
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), torch.ao.quantization.get_default_qconfig_mapping(), (x,))
    prepared(x)
    quantized = quantize_fx.convert_fx(prepared)
    assert len(layers(quantized)) == 2
    assert (quantized(x) - model(x)).std() < 0.1 * model(x).std()


def test_graph_mode_trains_around_the_layers() -> None:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    model, x = converted(network()).train(), images(64)
    prepared = quantize_fx.prepare_qat_fx(
        copy.deepcopy(model), torch.ao.quantization.get_default_qat_qconfig_mapping(), (x,)
    )
    prepared(x).sum().backward()
    assert [int(layer.num_batches_tracked) for layer in layers(prepared)] == [21, 21]


def test_torchao_quantizes_what_is_around_the_layers() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = converted(network(32)).eval()
    model[8] = nn.Linear(32, 32)
    x = images()
    expected = model(x)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert len(layers(model)) == 2
    torch.testing.assert_close(model(x), expected, atol=0.05, rtol=0.05)
