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
from .test_optimizers import YAML

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


@pytest.mark.parametrize("options", [{}, *MORE.values()], ids=["plain", *MORE])
def test_torch_fx_s_fuse_leaves_the_layers_alone(options: dict[str, Any]) -> None:
    optimization = pytest.importorskip("torch.fx.experimental.optimization")
    model, x = converted(network(), **options).eval(), images()
    untouched = optimization.fuse(model)
    assert len(layers(untouched)) == 2
    torch.testing.assert_close(untouched(x), model(x))
    if not options:
        folded = optimization.fuse(renorm.to_batchnorm(copy.deepcopy(model)))
        assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
        torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_torch_fx_sees_one_call_of_each_layer(training: bool) -> None:
    model, x = converted(network(), limits=LIMITS["constant"]).train(training), images()
    traced = copy.deepcopy(torch.fx.symbolic_trace(copy.deepcopy(model)))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == list("012345678")
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(traced.state_dict(), model.state_dict())


def test_torch_fx_keeps_masks_and_residuals() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = renorm.BatchRenorm1d(4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.norm(x, mask, residual=x, act="relu")
            return y

    model = Block()
    x, mask = torch.randn(8, 4), torch.arange(8) < 6
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    torch.testing.assert_close(traced(x, mask), model(x, mask))


def test_torchvision_extracts_features() -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    plain, x = network(), images()
    found = [
        extraction.create_feature_extractor(model, {"1": "norm", "5": "relu"}).eval()(x)
        for model in (plain, converted(plain))
    ]
    torch.testing.assert_close(found[1], found[0])


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_torch_script_is_told_to_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), renorm.BatchRenorm2d(4)).eval()
    with pytest.raises(RuntimeError, match=r"BatchRenorm2d: torch\.jit\.trace does"):
        torch.jit.script(model)
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(renorm.to_batchnorm(model))(x), expected)
