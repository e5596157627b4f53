"""torch.compile: one graph, no recompilation as steps and batches change, and the numbers of eager."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code
from torch.func import functional_call, grad, stack_module_state, vmap

import renorm

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.usefixtures("fresh_compiler"),
    # torch's tracer makes an instance of every autograd.Function, which torch itself deprecates
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]

RAMP = renorm.Limits(r_max=2.0, d_max=1.0, start=1, r_end=5, d_end=4)
LAYERS: dict[str, Callable[[], renorm.Norm]] = {
    "BatchNorm": lambda: renorm.BatchNorm2d(4),
    "BatchRenorm": lambda: renorm.BatchRenorm2d(4, limits=RAMP, momentum=0.2),
    "GhostBatchNorm": lambda: renorm.GhostBatchNorm2d(4, 3),
    "BatchGroupNorm": lambda: renorm.BatchGroupNorm2d(4, 2, limits=RAMP),
    "cumulative average": lambda: renorm.BatchRenorm2d(4, limits=RAMP, momentum=None),
    "switched limits": lambda: renorm.BatchRenorm2d(4, limits=renorm.Limits(2.0, 1.0, 2, 2, 2)),
    "without limits": lambda: renorm.BatchRenorm2d(4, limits=renorm.Limits(math.inf, math.inf, 1, 4, 3), momentum=0.2),
    "without parameters": lambda: renorm.BatchRenorm2d(4, limits=RAMP, affine=False),
    "example weight": lambda: renorm.BatchNorm2d(4, example_weight=0.3, tracking="total"),
    "activation": lambda: renorm.BatchNorm2d(4, act="silu"),
    "without statistics": lambda: renorm.BatchNorm2d(4, track_running_stats=False),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def compiled(layer: nn.Module, backend: str = "aot_eager", **options: Any) -> tuple[Any, Any]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(layer, fullgraph=True, backend=counter, **options), counter


def step(layer: Any, x: Tensor, *arguments: Tensor | None) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x, *arguments)
    leaves = [x, *layer.parameters()]
    return [y.detach(), *torch.autograd.grad(y.square().sum() + y.sum(), leaves)]


def assert_same_steps(layer: renorm.Norm, batches: list[Tensor], mask: Tensor | None = None, **options: Any) -> int:
    """Train or evaluate compiled and eager side by side; returns how often it compiled again after the first batch."""
    eager, counts = copy.deepcopy(layer), []
    fast, counter = compiled(layer, **options)
    for x in batches:
        for actual, expected in zip(step(fast, x, mask), step(eager, x, mask), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        for (name, actual), expected in zip(layer.named_buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
        counts.append(counter.frame_count)
    return counts[-1] - counts[0]


@every_layer
def test_training_is_one_graph_compiled_once_while_the_limits_move(make: Callable[[], renorm.Norm]) -> None:
    batches = [torch.randn(6, 4, 3, 3) * (1 + i) + i for i in range(7)]
    assert assert_same_steps(make(), batches) == 0


@pytest.mark.parametrize("name", ["BatchNorm", "BatchGroupNorm", "example weight", "activation"])
def test_evaluation_is_one_graph(name: str) -> None:
    assert assert_same_steps(LAYERS[name]().eval(), [torch.randn(6, 4, 3, 3) for _ in range(3)]) == 0


@pytest.mark.parametrize(
    ("name", "training"),
    [("BatchRenorm", True), ("GhostBatchNorm", True), ("BatchGroupNorm", True), ("example weight", False)],
)
def test_masks_compile(name: str, training: bool) -> None:
    layer = LAYERS[name]().train(training)
    mask = torch.rand(6, 3, 3) < 0.7
    assert assert_same_steps(layer, [torch.randn(6, 4, 3, 3) for _ in range(3)], mask) == 0


@pytest.mark.parametrize("name", ["BatchNorm", "BatchRenorm", "cumulative average"])
def test_the_batch_size_may_be_dynamic(name: str) -> None:
    batches = [torch.randn(n, 4, 3, 3) for n in (6, 9, 4, 12)]
    assert assert_same_steps(LAYERS[name](), batches, dynamic=True) == 0


@pytest.mark.parametrize("name", ["GhostBatchNorm", pytest.param("BatchGroupNorm", marks=pytest.mark.slow)])
def test_ghost_batches_of_a_changing_batch_size_compile(name: str) -> None:
    batches = [torch.randn(n, 4, 3, 3) for n in (6, 9, 10)]
    assert_same_steps(LAYERS[name](), batches)


def test_a_last_smaller_batch_recompiles_once_at_most() -> None:
    sizes = (8, 8, 8, 5, 8, 8, 5, 3)
    assert assert_same_steps(LAYERS["BatchRenorm"](), [torch.randn(n, 4, 3, 3) for n in sizes]) <= 1


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 2, 3, 2)], ids=["(N, C)", "3d"])
def test_input_of_another_rank_compiles(shape: tuple[int, ...]) -> None:
    layer = renorm.BatchRenorm(4, limits=RAMP)
    assert assert_same_steps(layer, [torch.randn(shape) for _ in range(3)]) == 0


def test_half_precision_compiles() -> None:
    layer = renorm.BatchRenorm2d(4, limits=RAMP)
    fast, _ = compiled(layer)
    x = torch.randn(6, 4, 3, 3).bfloat16()
    eager = copy.deepcopy(layer)
    torch.testing.assert_close(fast(x), eager(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), eager(x))


def test_a_batch_that_is_not_finite_is_skipped_in_compiled_code_too() -> None:
    layer = renorm.BatchRenorm2d(4, limits=RAMP)
    fast, counter = compiled(layer)
    x = torch.randn(6, 4, 3, 3)
    for batch in (x, x * torch.nan, x, x / 0.0):
        fast(batch)
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (2, 2)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="only oneDNN's convolutions choose a layout")
def test_compiled_convolutions_hand_their_layout_on() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1), renorm.BatchRenorm2d(16, act="relu"), nn.Conv2d(16, 16, 1))
    x = torch.randn(4, 16, 8, 8)
    # Under fresh caches: torch's key of a graph does not see what operations say of layouts.
    with fresh_inductor_cache():
        compiled = torch.compile(model, fullgraph=True)
        _, codes = run_and_get_code(lambda: compiled(x).sum().backward())
    for operation, code in zip(("normalize", "normalize_backward"), codes, strict=True):
        _, *calls = code.split(f"torch.ops.renorm.{operation}.default(")
        if not calls:
            pytest.skip("without kernels the compiler makes loops of the layer")
        strides = re.search(r"assert_size_stride\(\w+, \(4, 16, 8, 8\), \(([\d, ]+)\)", calls[0])
        assert strides is not None
        assert strides[1] == "1024, 1, 128, 16"


def test_a_model_compiles_in_whole() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), renorm.BatchRenorm2d(8, limits=RAMP), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3), renorm.BatchGroupNorm2d(8, 2), nn.ReLU(inplace=True),
    )  # fmt: skip
    eager = copy.deepcopy(model)
    fast, counter = compiled(model)
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        for actual, expected in zip(step(fast, x), step(eager, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"limits": RAMP, "momentum": 0.2}], ids=["plain", "renorm"])
def test_compiled_training_stays_with_eager_training(options: dict[str, Any], backend: str) -> None:
    """On means of 300 standard deviations, where nn.BatchNorm2d through inductor is 0.004 off in the first step."""
    eager = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), renorm.BatchNorm2d(8, **options), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), renorm.BatchNorm2d(8, **options), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 4 * 4, 2),
    )  # fmt: skip
    fast = copy.deepcopy(eager)
    calls = [compiled(fast, backend)[0], eager]
    optimizers = [torch.optim.SGD(model.parameters(), 0.02) for model in (fast, eager)]
    for number in range(5):
        x = 10 + 0.03 * (1 + number) * torch.randn(8, 3, 8, 8)
        found = []
        for model, call, optimizer in zip((fast, eager), calls, optimizers, strict=True):
            optimizer.zero_grad()
            y = call(x)
            y.square().mean().backward()
            found.append([y.detach(), *(parameter.grad for parameter in model.parameters()), *model.buffers()])
            optimizer.step()
        for actual, expected in zip(*found, strict=True):
            assert (actual - expected).abs().max() <= 2e-3 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BatchRenorm", "BatchGroupNorm"])
def test_the_default_compiler_gives_the_same(name: str) -> None:
    batches = [torch.randn(6, 4, 3, 3) * (1 + i) + i for i in range(4)]
    assert assert_same_steps(LAYERS[name](), batches, backend="inductor") == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_exports_as_torchs_own_operations(training: bool) -> None:
    layer = renorm.BatchRenorm2d(4, limits=renorm.Limits.constant(), act="relu").train(training)
    x, eager = torch.randn(6, 4, 3, 3), copy.deepcopy(layer)
    exported = torch.export.export(layer, (x,))
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert not any("renorm" in call for call in calls)  # which other runtimes do not know
    module = exported.module()
    for batch in (x, x * 2 + 1):
        torch.testing.assert_close(module(batch), eager(batch))
    for (name, actual), expected in zip(module.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_an_ensemble_under_vmap_compiles() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), renorm.BatchRenorm1d(4, limits=RAMP, momentum=0.2)) for _ in range(3)]
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0]).to("meta")

    def loss(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        y: Tensor = functional_call(base, (parameters, buffers), (x,))
        return y.sin().sum()

    gradients = vmap(grad(loss), (0, 0, None))
    fast = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    theirs = {name: buffer.clone() for name, buffer in buffers.items()}
    for _ in range(4):
        x = torch.randn(8, 3) * 2 + 1
        torch.testing.assert_close(fast(parameters, buffers, x), gradients(parameters, theirs, x))
    torch.testing.assert_close(buffers, theirs)
    assert buffers["1.num_batches_tracked"].tolist() == [4] * 3
