"""torch.export, AOTInductor and files: what leaves Python computes the same, and runs where renorm is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import renorm
from shipping.helpers import Every, converted, fill, images, inputs_of_every, plain, same, shapes_of_every

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]
weights = pytest.mark.parametrize("example_weight", [0.0, 0.3])
BATCH = Dim("batch")


def export(model: nn.Module, *x: Tensor, strict: bool = False) -> ExportedProgram:
    return torch.export.export(model, x, dynamic_shapes=tuple({0: BATCH} for _ in x), strict=strict)


def operations(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@weights
@pytest.mark.parametrize(("fuse", "strict"), [(False, False), (True, True)])
def test_an_exported_model_computes_the_same_for_every_batch_size(
    example_weight: float, fuse: bool, strict: bool
) -> None:
    model = converted(plain(), example_weight, fuse=fuse)
    program = export(model, images(), strict=strict)
    for n in (1, 2, 5):
        x = images(n)
        close(program.module()(x), model(x))


@weights
def test_every_kind_of_layer_is_exported(example_weight: float) -> None:
    model = Every(example_weight)
    program = torch.export.export(model, inputs_of_every(4), dynamic_shapes=shapes_of_every(BATCH))
    for n in (1, 5):
        inputs = inputs_of_every(n)
        for one, other in zip(program.module()(*inputs), model(*inputs), strict=True):
            close(one, other)


@weights
def test_every_dimension_may_be_dynamic(example_weight: float) -> None:
    layer = renorm.BatchRenorm2d(8, example_weight=example_weight).eval()
    shape = {0: BATCH, 2: Dim("height"), 3: Dim("width")}
    program = torch.export.export(layer, (torch.randn(4, 8, 5, 6),), dynamic_shapes=(shape,))
    x = torch.randn(2, 8, 9, 3)
    close(program.module()(x), layer(x))


@weights
@pytest.mark.parametrize("grad", [False, True])
def test_the_graph_has_torchs_own_operations_only(example_weight: float, grad: bool) -> None:
    model = converted(plain(), example_weight, fuse=True).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        program = export(model, images())
    assert {name.split(".")[0] for name in operations(program)} == {"aten"}


def test_without_an_example_weight_the_graph_is_batch_norms() -> None:
    theirs = plain()
    programs = [export(model, images(), strict=True) for model in (converted(theirs), theirs)]
    ours, expected = map(operations, programs)
    assert ours == expected


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("cls", [renorm.BatchRenorm2d, renorm.BatchGroupNorm2d])
def test_a_layer_exported_in_training_mode_trains_by_torchs_own_operations(cls: Any, strict: bool) -> None:
    options = {"num_groups": 2} if cls is renorm.BatchGroupNorm2d else {}
    layer = cls(4, limits=renorm.Limits(1.5, 0.5, start=1, r_end=4, d_end=3), momentum=0.1, act="relu", **options)
    program = torch.export.export(copy.deepcopy(layer), (images(6)[:, :1].repeat(1, 4, 1, 1),), strict=strict)
    assert not [name for name in operations(program) if "renorm" in name]
    exported = program.module()
    for _ in range(5):
        x = images(6)[:, :1].repeat(1, 4, 1, 1) * 2 + 1
        found = []
        for model in (exported, layer):
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            found.append([y, *torch.autograd.grad(y.sin().sum(), [leaf, *dict(model.named_parameters()).values()])])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    buffers = dict(exported.named_buffers())
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


@weights
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.10, when it loads
def test_an_exported_model_survives_a_file(example_weight: float, tmp_path: Path) -> None:
    program = export(converted(plain(), example_weight), images())
    torch.export.save(program, tmp_path / "model.pt2")
    x = images(2)
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), program.module()(x))


@weights
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_has_torchs_own_operations_only(example_weight: float) -> None:
    model = converted(plain(), example_weight, fuse=True).requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(model, images())
    assert "renorm::" not in str(traced.inlined_graph)
    x = images(2)
    close(traced(x), model(x))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@weights
def test_aotinductor_computes_the_same_for_every_batch_size(example_weight: float, tmp_path: Path) -> None:
    model = converted(plain(), example_weight)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            export(model, images()), package_path=str(tmp_path / "model.pt2")
        )
        compiled = torch._inductor.aoti_load_package(path)
        for n in (1, 5):
            x = images(n)
            close(compiled(x), model(x))


# --- safetensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_safetensors_file_is_batch_norms(dtype: torch.dtype, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    ours = converted(plain()).to(dtype)
    safetensors.save_file(ours.state_dict(), tmp_path / "model.safetensors")
    loaded = safetensors.load_file(tmp_path / "model.safetensors")
    again, theirs = converted(plain()).to(dtype), plain()
    again.load_state_dict(loaded)
    theirs.load_state_dict(loaded)
    same(again, ours)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name].to(tensor.dtype)), name


def test_a_safetensors_file_of_batch_norm_loads(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    theirs, ours = plain(), converted(plain())
    safetensors.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    safetensors.load_model(ours, tmp_path / "model.safetensors")
    same(ours, theirs)


def test_a_shared_layer_loads_from_its_one_place_in_the_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")

    def shared() -> nn.Module:
        layer = renorm.BatchRenorm2d(3)
        return nn.Sequential(layer, nn.ReLU(), layer).eval()

    ours, again = shared(), shared()
    fill(ours)
    ours.get_buffer("0.num_batches_tracked").fill_(7_000)
    safetensors.save_model(ours, str(tmp_path / "model.safetensors"))
    # not strict: a format without metadata has no version, and layers of version 1 look for no count
    safetensors.load_model(again, tmp_path / "model.safetensors", strict=False)
    same(again, ours)


def test_exported_functions_cast_no_statistics_to_what_they_are() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return renorm.functional.batch_renorm(x, mean, var, r_max=2.0, d_max=1.0)[0]

    program = torch.export.export(Layer(), (torch.randn(4, 3), torch.zeros(3), torch.ones(3)))
    assert not [node for node in program.graph.nodes if "to.dtype" in str(node.target)]
