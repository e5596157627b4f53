"""From inspect to ONNX Runtime on the models people have, without a line for any of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import renorm

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]
CLASSES = 7


def transformers_resnet() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=CLASSES
    )
    return transformers.ResNetForImageClassification(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm resnet50": (lambda: timm.create_model("resnet50", num_classes=CLASSES), 64),
    "timm mobilenetv2_100": (lambda: timm.create_model("mobilenetv2_100", num_classes=CLASSES), 64),
    "timm inception_v3": (lambda: timm.create_model("inception_v3", num_classes=CLASSES), 96),
    "timm densenet121": (lambda: timm.create_model("densenet121", num_classes=CLASSES), 64),
    "torchvision resnet50": (lambda: torchvision.models.resnet50(num_classes=CLASSES), 64),
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES), 64),
    "torchvision inception_v3": (
        lambda: torchvision.models.inception_v3(num_classes=CLASSES, aux_logits=False, init_weights=False), 96,
    ),
    "torchvision densenet121": (lambda: torchvision.models.densenet121(num_classes=CLASSES), 64),
    "transformers ResNet": (transformers_resnet, 64),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def given(request: pytest.FixtureRequest) -> tuple[nn.Module, list[Any]]:
    """A model with statistics of its own, and batches as its library has them."""
    build, size = request.param
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        model = build()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
    batches: list[Any] = [(torch.randn(8, 3, size, size), torch.randint(CLASSES, (8,))) for _ in range(3)]
    if build is transformers_resnet:
        batches = [{"pixel_values": x, "labels": y} for x, y in batches]
    renorm.estimate(model, batches)
    return model.eval(), batches


def image_of(batch: Any) -> Tensor:
    x: Tensor = batch["pixel_values"] if isinstance(batch, dict) else batch[0]
    return x


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return getattr(found, "logits", found)


def test_inspect_sees_every_norm_layer(given: tuple[nn.Module, list[Any]]) -> None:
    model, batches = given
    found = renorm.inspect(model, batches)
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    assert [layer.name for layer in found.layers] == names
    for layer in found.layers:
        assert layer.batches == 3
        assert layer.range_training <= layer.bound
        assert layer.shift < 0.05, layer.name  # the statistics are of these data
        assert layer.scale == pytest.approx(1, abs=0.1), layer.name
    assert [mode.metric for mode in found.modes] == ["accuracy", "cross_entropy"]


def test_what_is_weighed_is_computed_by_onnx_runtime(given: tuple[nn.Module, list[Any]], tmp_path: Path) -> None:
    model, batches = copy.deepcopy(given)
    found = renorm.weigh(model, batches, "cross_entropy")
    assert found.before.mean == pytest.approx(found.curve[0].score.mean)
    layers = [module for module in model.modules() if isinstance(module, renorm.Norm)]
    assert len(layers) == sum(isinstance(module, _BatchNorm) for module in given[0].modules())
    for layer in layers:
        layer.example_weight = 0.2
    check_in_onnx_runtime(model, image_of(batches[0]), tmp_path / "weighed.onnx")


def test_there_and_back_folds_as_the_model_itself(given: tuple[nn.Module, list[Any]], tmp_path: Path) -> None:
    from torch.fx.experimental.optimization import fuse

    model, batches = given
    x = image_of(batches[0])
    there = renorm.convert(copy.deepcopy(model), renorm.BatchRenorm)
    assert torch.equal(output(there, x), output(model, x))
    back = renorm.to_batchnorm(there)
    assert torch.equal(output(back, x), output(model, x))
    try:
        expected = fuse(model)
    except Exception as error:
        with pytest.raises(type(error)):
            fuse(back)
        pytest.skip(f"torch.fx cannot fold {type(model).__name__}: {error}")
    folded = fuse(back)
    assert count_norms(folded) == count_norms(expected)
    assert torch.equal(output(folded, x), output(expected, x))
    check_in_onnx_runtime(folded, x, tmp_path / "folded.onnx")


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def check_in_onnx_runtime(model: nn.Module, x: Tensor, path: Path) -> None:
    """To 1e-5, or to what float32 leaves of the outputs of a deep network: its own distance from float64."""
    torch.onnx.export(
        model, (x[:2],), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        optimize=False,  # which takes most of the time, for a faster file
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    exact = copy.deepcopy(model).double()
    for n in (1, 5):
        (found,) = session.run(None, {session.get_inputs()[0].name: x[:n].numpy()})
        expected = output(model, x[:n])
        own = float((output(exact, x[:n].double()) - expected).abs().max())
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=max(1e-5, 5 * own))
