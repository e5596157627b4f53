"""Tools that put something else in the place of batch norm: they do it exactly, leave our layers alone, or say no."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import renorm

from .helpers import LIMITS, converted, images, layers, network
from .test_optimizers import YAML, ultralytics

__all__ = ["ultralytics"]  # a fixture

QUANTIZATION = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
]
MORE: dict[str, dict[str, Any]] = {"example weight": {"example_weight": 0.1}, "activation": {"act": "relu"}}
more = pytest.mark.parametrize("options", MORE.values(), ids=MORE)


def conv_and_norm(**options: Any) -> Any:
    return converted(network(), limits=LIMITS["constant"], **options)[:2].eval()


def test_torch_s_folding_is_exact() -> None:
    model = conv_and_norm()
    folded = nn.utils.fuse_conv_bn_eval(*model)
    x = images()
    torch.testing.assert_close(folded(x), model(x))


@more
def test_torch_s_folding_loses_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"^fuse_conv_bn_eval takes BatchRenorm2d for a scale and a shift"):
        nn.utils.fuse_conv_bn_eval(*conv_and_norm(**options))


def test_folding_of_a_linear_layer_is_exact() -> None:
    model = nn.Sequential(nn.Linear(4, 8), renorm.BatchRenorm1d(8))
    x = torch.randn(16, 4)
    model(x)
    folded = nn.utils.fuse_linear_bn_eval(*model.eval())
    torch.testing.assert_close(folded(x), model(x))


def test_torch_s_synchronized_batch_norm_names_what_to_call_instead() -> None:
    model = converted(network())
    with pytest.raises(RuntimeError, match=r'call renorm\.synchronize\(model, "batch"\) instead'):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert len(layers(model)) == 2


def test_a_copy_of_torch_s_converter_is_refused_too() -> None:
    def my_convert_sync_batchnorm(module: Any) -> nn.Module:
        new = nn.SyncBatchNorm(module.num_features, module.eps, module.momentum)
        new.running_mean = module.running_mean
        return new

    with pytest.raises(RuntimeError, match=r"my_convert_sync_batchnorm would replace BatchRenorm2d by a synchronized"):
        my_convert_sync_batchnorm(conv_and_norm()[1])


def test_timm_s_split_batch_norm_is_refused_before_it_replaces_anything() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    model = converted(network())
    with pytest.raises(RuntimeError, match=r"convert_splitbn_model would replace BatchRenorm2d by another batch norm"):
        timm_layers.convert_splitbn_model(model)
    assert len(layers(model)) == 2
    split = timm_layers.convert_splitbn_model(converted(network(), renorm.BatchNorm))
    assert not layers(split)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_mkldnn_evaluates_exactly_or_not_at_all() -> None:
    mkldnn = pytest.importorskip("torch.utils.mkldnn")
    model, x = conv_and_norm(), images()
    made = mkldnn.to_mkldnn(copy.deepcopy(model))
    torch.testing.assert_close(made(x.to_mkldnn()).to_dense(), model(x), atol=1e-5, rtol=1e-4)
    model[1].example_weight = 0.1
    with pytest.raises(RuntimeError, match=r"MkldnnBatchNorm.__init__ takes BatchRenorm2d for a scale and a shift"):
        mkldnn.to_mkldnn(model)


def with_levit() -> Any:
    levit = pytest.importorskip("timm.models.levit")
    return nn.Sequential(levit.ConvNorm(3, 8, 3)), "ConvNorm.fuse"


def with_repvgg() -> Any:
    byobnet = pytest.importorskip("timm.models.byobnet")
    return nn.Sequential(byobnet.RepVggBlock(8, 8)), "RepVggBlock._fuse_bn_tensor"


@pytest.mark.parametrize("make", [with_levit, with_repvgg])
def test_timm_reparameterizes_exactly_or_not_at_all(make: Callable[[], Any]) -> None:
    utils = pytest.importorskip("timm.utils.model")
    model, function = make()
    x = torch.randn(8, next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels, 8, 8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
    model(x)
    model = renorm.convert(model, renorm.BatchRenorm).eval()
    torch.testing.assert_close(utils.reparameterize_model(model)(x), model(x), atol=1e-5, rtol=1e-4)
    for layer in layers(model):
        layer.example_weight = 0.1
    with pytest.raises(RuntimeError, match=rf"^{function} takes BatchRenorm\w* for a scale and a shift"):
        utils.reparameterize_model(model)


@pytest.mark.slow
def test_ultralytics_folds_exactly_or_not_at_all(ultralytics: Any) -> None:
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel(YAML, verbose=False)
    x = torch.rand(4, 3, 32, 32)
    model.train()(x)
    model = renorm.convert(model, renorm.BatchRenorm).eval()
    weighted = copy.deepcopy(model)
    expected = model(x)[0]
    folded = model.fuse(verbose=False)
    assert not layers(folded)
    torch.testing.assert_close(folded(x)[0], expected, atol=1e-3, rtol=1e-3)
    for layer in layers(weighted):
        layer.example_weight = 0.1
    with pytest.raises(RuntimeError, match=r"^fuse_conv_and_bn takes BatchRenorm2d for a scale and a shift"):
        weighted.fuse(verbose=False)


def test_torch_fx_s_fuse_takes_torch_s_layers() -> None:
    optimization = pytest.importorskip("torch.fx.experimental.optimization")
    model = converted(network()).eval()
    with pytest.raises(TypeError, match=r"torch.fx cannot trace into BatchRenorm2d: replace it first"):
        optimization.fuse(model)
    fused = optimization.fuse(renorm.to_batchnorm(copy.deepcopy(model)))
    x = images()
    torch.testing.assert_close(fused(x), model(x), atol=1e-5, rtol=1e-4)


def eager(model: nn.Module) -> object:
    return torch.ao.quantization.fuse_modules(model.eval(), ["0", "1", "2"])


def eager_training(model: nn.Module) -> object:
    return torch.ao.quantization.fuse_modules_qat(model.train(), ["0", "1", "2"])


def graph(model: nn.Module) -> object:
    from torch.ao.quantization import quantize_fx

    mapping = torch.ao.quantization.get_default_qconfig_mapping()
    return quantize_fx.prepare_fx(model.eval(), mapping, (images(),))


def graph_training(model: nn.Module) -> object:
    from torch.ao.quantization import quantize_fx

    mapping = torch.ao.quantization.get_default_qat_qconfig_mapping()
    return quantize_fx.prepare_qat_fx(model.train(), mapping, (images(),))


QUANTIZERS = [eager, eager_training, graph, graph_training]


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_torch_s_quantization_takes_torch_s_layers(quantize: Callable[[nn.Module], object]) -> None:
    model = converted(network())
    with pytest.raises((AssertionError, NotImplementedError, TypeError), match=r"BatchRenorm2d"):
        quantize(copy.deepcopy(model))
    quantize(renorm.to_batchnorm(model))


def test_torchao_quantizes_what_is_around_the_layers() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = converted(network(32)).eval()
    model[8] = nn.Linear(32, 32)
    x = images()
    expected = model(x)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert len(layers(model)) == 2
    torch.testing.assert_close(model(x), expected, atol=0.05, rtol=0.05)


def test_an_affine_map_of_one_s_own_is_told_what_it_misses() -> None:
    def scale(layer: Any) -> Any:
        return layer.weight / (layer.running_var + layer.eps).sqrt()

    layer = conv_and_norm()[1]
    assert scale(layer).shape == (8,)
    layer.example_weight = 0.1
    with pytest.raises(RuntimeError, match=r"example_weight=0\.1 weighs every example's own statistics in"):
        scale(layer)


def test_settings_may_be_read() -> None:
    layer = conv_and_norm(example_weight=0.1)[1]
    assert (layer.eps, layer.momentum, layer.affine, layer.track_running_stats) == (1e-5, 0.01, True, True)


def test_a_model_is_pickled_whole(tmp_path: Path) -> None:
    model = converted(network(), example_weight=0.1).eval()
    torch.save(model, tmp_path / "model.pt")
    x = images()
    torch.testing.assert_close(torch.load(tmp_path / "model.pt", weights_only=False)(x), model(x))
