"""Networks of torchvision, timm and the lab, fused."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fusion.helpers import batch, check_same, converted, fused, reasons
from renorm_lab.networks.models import build_model


def from_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("torchvision.models"), name)(**options)


def from_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name)


def from_lab(name: str) -> Callable[[], nn.Module]:
    norm = nn.BatchNorm1d if name == "mlp" else nn.BatchNorm2d
    return lambda: build_model(name, (3, 32, 32), 5, norm)


# Name, size of the images, and how often what is fused: (residual add?, activation) -> calls.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, dict[tuple[bool, str | None], int]]] = {
    "torchvision resnet18": (from_torchvision("resnet18"), 32, {(False, "relu"): 9, (True, "relu"): 8}),
    "torchvision inception_v3": (
        from_torchvision("inception_v3", init_weights=False, aux_logits=False), 75, {(False, "relu"): 94},
    ),
    "torchvision mobilenet_v2": (from_torchvision("mobilenet_v2"), 32, {(False, "relu6"): 35}),
    # From images of 32 pixels two elements are left to normalize in the last stage of these, which magnifies rounding.
    "torchvision mobilenet_v3_small": (
        from_torchvision("mobilenet_v3_small"), 64, {(False, "relu"): 5, (False, "hardswish"): 18},
    ),
    "timm resnet18": (from_timm("resnet18"), 32, {(False, "relu"): 9, (True, "relu"): 8}),
    "timm mobilenetv2_100": (from_timm("mobilenetv2_100"), 32, {(False, "relu6"): 35, (True, None): 10}),
    "timm efficientnet_b0": (from_timm("efficientnet_b0"), 64, {(False, "silu"): 33, (True, None): 9}),
    "timm mobilenetv3_small_100": (
        from_timm("mobilenetv3_small_100"), 64,
        {(False, "relu"): 5, (False, "hardswish"): 18, (True, None): 6},
    ),
    "lab resnet8": (from_lab("resnet8"), 32, {(False, "relu"): 4, (True, "relu"): 3}),
    "lab resnet20": (from_lab("resnet20"), 32, {(False, "relu"): 10, (True, "relu"): 9}),
    "lab mlp": (from_lab("mlp"), 32, {(False, "relu"): 4}),
}  # fmt: skip


@pytest.mark.parametrize(("build", "size", "expected"), MODELS.values(), ids=MODELS)
def test_a_model_computes_the_same_fused(
    build: Callable[[], nn.Module], size: int, expected: dict[tuple[bool, str | None], int]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        model = build().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)  # some models start residual branches at 0
            # At a mean of 0, what ReLU has set to 0 stays there within limits: at a kink, where rounding decides.
            nn.init.normal_(module.running_mean, std=0.1)
    report = check_same(model, batch(2, 3, size, size))
    assert Counter((row.adds, row.act) for row in report.fused) == expected
    assert len(report.fused) + len(report.not_fused) == len(report.replaced)


def test_a_residual_network_says_what_is_left() -> None:
    report = converted(from_torchvision("resnet18")(), fuse=True)[1]
    assert set(reasons(report)) == {f"layer{i}.0.downsample.1" for i in (2, 3, 4)}
    assert set(reasons(report).values()) == {"its output leaves Sequential"}


def test_parts_of_a_fused_model_work_by_themselves() -> None:
    plain, model = converted(from_timm("resnet18")())[0].eval(), fused(from_timm("resnet18")()).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), plain.forward_features(x))
        expected = plain(x)
        model.set_grad_checkpointing(True)
        torch.testing.assert_close(model(x), expected)
        for either in (plain, model):
            either.reset_classifier(3)
        assert model(x).shape == (2, 3)
