"""What "auto" decays in the models people have, and that converted models have the same answer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import renorm
from renorm.optim import param_groups

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

# In a residual network every block's last layer adds to the stream, which leads to the output past all later blocks
# but the first of a stage, whose shortcut is normalized: the last stage's blocks are left.
RESNET_18 = ["layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2"]
RESNET_50 = ["layer4.0.bn3", "layer4.0.downsample.1", "layer4.1.bn3", "layer4.2.bn3"]
# In Inception, the last layer of every branch of the last block.
INCEPTION = [
    f"Mixed_7c.{branch}.bn"
    for branch in ("branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool")
]
MODELS: dict[tuple[str, str], list[str]] = {
    ("torchvision", "resnet18"): RESNET_18,
    ("torchvision", "resnet50"): RESNET_50,
    ("torchvision", "inception_v3"): ["AuxLogits.conv1.bn", *INCEPTION],
    # The last layer normalizes everything that comes before: pre-activation, dense connections, MobileNet's last block.
    ("torchvision", "densenet121"): ["features.norm5"],
    ("torchvision", "mobilenet_v2"): ["features.18.1"],
    ("timm", "resnet18"): RESNET_18,
    ("timm", "resnet50"): RESNET_50,
    ("timm", "inception_v3"): INCEPTION,
    ("timm", "resnetv2_18"): ["norm"],
    ("timm", "resnetv2_50"): ["norm"],
    ("timm", "densenet121"): ["features.norm5"],
    ("timm", "mobilenetv2_100"): ["bn2"],
    # The last block is a convolution and its layer, and the head has none.
    ("timm", "mobilenetv3_small_100"): ["blocks.5.0.bn1"],
    ("timm", "vit_tiny_patch16_224"): ["norm"],
}
models = pytest.mark.parametrize(
    ("library", "name", "expected"),
    [(*key, expected) for key, expected in MODELS.items()],
    ids=[f"{library} {name}" for library, name in MODELS],
)


def built(library: str, name: str) -> nn.Module:
    options: dict[str, Any] = {"init_weights": False} if (library, name) == ("torchvision", "inception_v3") else {}
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # the libraries' own
        model: nn.Module = make(name, **options)
    return model


def decayed_norms(model: nn.Module) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group["params"] for group in param_groups(model, 1e-4)}
    gammas = [names[id(parameter)].removesuffix(".weight") for parameter in groups["gamma"]]
    assert [names[id(parameter)].removesuffix(".bias") for parameter in groups["beta"]] == gammas
    return gammas


@models
def test_decayed_are_the_layers_with_a_path_to_the_output(library: str, name: str, expected: list[str]) -> None:
    assert decayed_norms(built(library, name)) == expected


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision", "resnet18"), ("timm", "resnet18"), ("timm", "resnetv2_18"), ("timm", "mobilenetv2_100"),
        ("timm", "inception_v3"), ("timm", "densenet121"),
    ],
)  # fmt: skip
def test_a_converted_model_has_the_same_answer(library: str, name: str, fuse: bool) -> None:
    model = renorm.convert(built(library, name), renorm.BatchRenorm, fuse=fuse)
    assert decayed_norms(model) == MODELS[library, name]
