"""ONNX: one file for every batch size, of standard operators, that ONNX Runtime computes as we do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from shipping.helpers import Every, converted, images, inputs_of_every, plain, shapes_of_every

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*axis name. batch will not be used.*:UserWarning"),  # for the second input
]
BATCH = Dim("batch")


def export(model: nn.Module, path: Path, inputs: tuple[Any, ...], shapes: tuple[Any, ...]) -> None:
    torch.onnx.export(model, inputs, path, dynamo=True, dynamic_shapes=shapes, verbose=False)


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {put.name: value.numpy() for put, value in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feeds)]


def operators(path: Path) -> set[Any]:
    model = onnx.load(path)
    onnx.checker.check_model(path)
    assert not model.functions
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    return {node.op_type for node in model.graph.node}


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("example_weight", "fuse"), [(0.0, False), (0.3, False), (0.3, True)])
def test_a_model_computes_the_same_for_every_batch_size(example_weight: float, fuse: bool, tmp_path: Path) -> None:
    model, path = converted(plain(), example_weight, fuse=fuse), tmp_path / "model.onnx"
    export(model, path, (images(),), ({0: BATCH},))
    operators(path)
    for n in (1, 5):
        x = images(n)
        close(run(path, x)[0], model(x).detach())


@pytest.mark.slow
@pytest.mark.parametrize("example_weight", [0.0, 0.3])
def test_every_kind_of_layer_computes_the_same(example_weight: float, tmp_path: Path) -> None:
    model, path = Every(example_weight), tmp_path / "model.onnx"
    export(model, path, inputs_of_every(4), shapes_of_every(BATCH))
    operators(path)
    for n in (1, 5):
        inputs = inputs_of_every(n)
        flat = torch.utils._pytree.tree_leaves(inputs)
        for one, other in zip(run(path, *flat), model(*inputs), strict=True):
            close(one, other.detach())


def test_without_an_example_weight_the_file_computes_batch_norm_bit_for_bit(tmp_path: Path) -> None:
    theirs, x = plain(), images()
    outputs, kinds = [], []
    for name, model in (("ours", converted(theirs)), ("theirs", theirs)):
        path = tmp_path / f"{name}.onnx"
        export(model, path, (x,), ({0: BATCH},))
        outputs.append(run(path, x)[0])
        kinds.append(operators(path))
    assert kinds[0] == kinds[1]
    assert torch.equal(*outputs)
