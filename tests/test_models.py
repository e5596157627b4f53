"""convert and to_batchnorm on the models people have: random weights, small images."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm
from renorm import convert, to_batchnorm

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

slow = pytest.mark.slow
MODELS: dict[str, tuple[Callable[[], nn.Module], int, Any]] = {
    "timm resnet18": (lambda: timm.create_model("resnet18"), 32, ()),
    "timm mobilenetv3_small_100": (lambda: timm.create_model("mobilenetv3_small_100"), 64, ()),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), 64, ()),
    "timm resnetv2_50": (lambda: timm.create_model("resnetv2_50"), 64, ()),
    "timm inception_v3": (lambda: timm.create_model("inception_v3"), 96, ()),
    "torchvision inception_v3": (lambda: torchvision.models.inception_v3(init_weights=False, aux_logits=False), 96, ()),
    "torchvision inception_v3 with aux_logits": (
        lambda: torchvision.models.inception_v3(init_weights=False),
        299,
        slow,
    ),
}
models = pytest.mark.parametrize(
    ("build", "size"),
    [pytest.param(build, size, marks=marks, id=name) for name, (build, size, marks) in MODELS.items()],
)


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """A model whose statistics are not those of a fresh one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)  # some models start residual branches at 0
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(100)
    return model


def logits(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def batch_norms(model: nn.Module) -> list[str]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return [name for name, layer in layers.items() if not isinstance(layer, renorm.Norm)]


@models
def test_a_converted_model_evaluates_bit_for_bit_trains_and_goes_back(
    build: Callable[[], nn.Module], size: int
) -> None:
    model = built(build)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    names, keys = batch_norms(model), list(model.state_dict())
    parameters = [id(parameter) for parameter in model.parameters()]
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.eval()(x)

    reports: list[renorm.ConversionReport] = []
    model = convert(model, renorm.BatchRenorm, limits=renorm.Limits.constant(), report=reports.append)
    assert [row.name for row in reports[0].replaced] == names
    assert reports[0].passed_over == ()
    assert batch_norms(model) == []
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(model(x), expected)

    used = [name for name in names if not name.startswith("AuxLogits")]
    before = {name: model.get_submodule(name).weight.detach().clone() for name in used}
    model.train()
    logits(model(x)).logsumexp(1).mean().backward()
    optimizer.step()
    for name in used:
        layer = model.get_submodule(name)
        assert layer.num_batches_tracked == 101, name
        assert not torch.equal(layer.weight, before[name]), name

    with torch.no_grad():
        expected = model.eval()(x)
        plain = to_batchnorm(model)
        assert torch.equal(plain(x), expected)
    assert batch_norms(plain) == names
    assert [id(parameter) for parameter in plain.parameters()] == parameters
    assert list(plain.state_dict()) == keys


def test_a_pre_activation_model_keeps_its_activations() -> None:
    model = timm.create_model("resnetv2_50")
    kinds = (timm.layers.BatchNormAct2d, renorm.BatchRenorm2d)
    acts = [type(module.act) for module in model.modules() if isinstance(module, kinds)]
    convert(model, renorm.BatchRenorm)
    assert nn.ReLU in acts
    assert [type(module.act) for module in model.modules() if isinstance(module, kinds)] == acts
    assert not any(isinstance(module, timm.layers.BatchNormAct2d) for module in model.modules())


@pytest.mark.parametrize("family", ["BatchNorm", "GhostBatchNorm", "BatchGroupNorm"])
def test_resnet18_converts_to_every_family(family: str) -> None:
    options: dict[str, Any] = {"GhostBatchNorm": {"examples_per_group": 2}, "BatchGroupNorm": {"num_groups": 64}}
    model = built(lambda: timm.create_model("resnet18"))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(x)
        convert(model, getattr(renorm, family), **options.get(family, {}))
        if family != "BatchGroupNorm":
            assert torch.equal(model(x), expected)
        assert model.train()(x).isfinite().all()
