"""Tools built on torch.fx: what the error says to pass is what works."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import fx, nn

import renorm


def told(error: BaseException, pattern: str) -> Any:
    """What the message says to write, evaluated."""
    (code,) = re.findall(pattern, str(error))
    return eval(code, {"renorm": renorm, "torch": torch})


def test_torchvision_s_feature_extractor_takes_what_the_error_names() -> None:
    torchvision = pytest.importorskip("torchvision")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = renorm.convert(torchvision.models.resnet18(num_classes=2), renorm.BatchRenorm).eval()
    with pytest.raises(TypeError, match="cannot trace into BatchRenorm2d") as caught:
        extraction.create_feature_extractor(model, ["layer1"])
    arguments = told(caught.value, r"tracer_kwargs=(\{.*?\})")
    x = torch.randn(2, 3, 32, 32)
    features = extraction.create_feature_extractor(model, ["layer1", "fc"], tracer_kwargs=arguments)
    found = features(x)
    torch.testing.assert_close(found["fc"], model(x))
    before = int(model.bn1.num_batches_tracked)
    features.train()(x)
    assert model.bn1.num_batches_tracked == before + 1


def test_a_tracer_takes_what_the_error_names() -> None:
    model = nn.Sequential(nn.Linear(3, 4), renorm.BatchRenorm1d(4), nn.ReLU()).eval()
    with pytest.raises(TypeError, match="cannot trace into BatchRenorm1d") as caught:
        fx.symbolic_trace(model)

    class Tracer(fx.Tracer):
        is_leaf_module = told(caught.value, "is_leaf_module = (lambda .*)")

    x = torch.randn(5, 3)
    graph = Tracer().trace(model)
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
