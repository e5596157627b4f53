"""The page's table of who computes what, derived cell by cell from what the code does."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import renorm
from renorm.moments import Moments
from renorm.ops import backends, kernels, schema
from renorm.workers.group import Workers

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
KERNEL, BATCH_NORM, OPERATIONS, REFUSED = "one kernel", "torch's batch norm", "torch's operations", "refused"
# The page's columns.
COLUMNS = ("CPU", "CPU without kernels", "GPU", "GPU, RENORM_GPU=triton", "torch.compile")
SHAPE = (6, 4, 3, 3)

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Conversion of an array with ndim:DeprecationWarning"
    ),  # Triton 3.4's interpreter
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Seen(TorchDispatchMode):
    """Names of the operations on tensors that are as large as the input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, set[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, found))
        if any(isinstance(tensor, Tensor) and tensor.numel() >= self.size for tensor in tensors):
            self.names.add(operation.name())
        return found


# What makes, copies or views a tensor, and computes nothing.
STILL = re.compile(
    r"aten::(empty|new_|_?unsafe_view|view|as_strided|detach|expand|unsqueeze|permute|transpose|copy_|clone|_to_copy|t$|alias"
    r"|zeros|ones|lift|unfold|is_same_size|stride|prim|slice|select|unbind|ones_like|randn)"
)


def who(names: set[str]) -> str:
    """What a cell says of these operations."""
    if names == {REFUSED}:
        return REFUSED
    computing = {name for name in names if not STILL.match(name)}
    if computing and all(name.startswith("renorm::") for name in computing):
        return KERNEL
    return BATCH_NORM if any("batch_norm" in name for name in computing) else OPERATIONS


class Case:
    """Of a row: what to ask of a layer, on which device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.named: set[str] = set()

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape or SHAPE, device=self.device).to(dtype)

    def watched(self, run: Callable[[], Any], size: int) -> set[str]:
        with Seen(size) as seen:
            run()
        return seen.names | self.named


def train(
    layer: Callable[..., renorm.Norm] = renorm.BatchRenorm2d,
    shape: tuple[int, ...] = SHAPE,
    dtype: torch.dtype = torch.float32,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    options: Callable[[Case, Tensor], dict[str, Any]] = lambda case, x: {},
    around: Callable[[nn.Module], Any] = lambda layer: contextlib.nullcontext(),
    evaluate: bool = False,
    **settings: Any,
) -> Callable[[Case], set[str]]:
    """A forward and its backward."""

    def run(case: Case) -> set[str]:
        norm = layer(4, device=case.device, **settings).train(not evaluate)
        x = layout(case.draw(*shape, dtype=dtype)).requires_grad_()
        given, dy = options(case, x), torch.ones_like(x)

        def step() -> None:
            with around(norm):
                y = norm(x, **given)
            if case.device == "cuda":
                return  # whose backward autograd does not start without a device; one choice is made for both
            leaves = [x, *norm.parameters(), *(t for t in given.values() if isinstance(t, Tensor) and t.requires_grad)]
            torch.autograd.grad(y, leaves, dy)

        return case.watched(step, x.numel())

    return run


def evaluate(options: Callable[[Case, Tensor], dict[str, Any]] = lambda case, x: {}, **settings: Any) -> Any:
    """A forward without gradients."""

    def run(case: Case) -> set[str]:
        norm, x = renorm.BatchRenorm2d(4, device=case.device, **settings).eval(), case.draw()
        given = options(case, x)
        with torch.no_grad():
            return case.watched(lambda: norm(x, **given), x.numel())

    return run


def masked(case: Case, x: Tensor) -> dict[str, Any]:
    return {"mask": torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool, device=case.device)}


def added(case: Case, x: Tensor) -> dict[str, Any]:
    return {"residual": torch.randn_like(x).requires_grad_()}


def added_in_double(case: Case, x: Tensor) -> dict[str, Any]:
    return {"residual": x.detach().double().requires_grad_()}


def moved(tracking: Any) -> Callable[[Case], set[str]]:
    def run(case: Case) -> set[str]:
        norm = renorm.BatchRenorm2d(4, device=case.device, tracking=tracking)
        moments = Moments(*(torch.ones(1, n, device=case.device) for n in (4, 4, 1)))
        return case.watched(lambda: norm.commit([moments]), 4)

    return run


def recurrent(masked: bool) -> Callable[[Case], set[str]]:
    """Its first norm layer, at every step."""

    def run(case: Case) -> set[str]:
        gru = renorm.BatchRenormGRU(3, 2, device=case.device)
        norm, seen = gru.cells[0].norm_ih, set[str]()  # type: ignore[union-attr]
        mask = torch.ones(5, 4, dtype=torch.bool, device=case.device) if masked else None
        with Seen(4 * 6) as mode:
            norm.register_forward_pre_hook(lambda *_: mode.names.clear())  # type: ignore[union-attr]
            norm.register_forward_hook(lambda *_: seen.update(mode.names))  # type: ignore[union-attr]
            gru(case.draw(5, 4, 3), mask=mask)
        return seen | case.named

    return run


def twice(case: Case) -> set[str]:
    norm, x = renorm.BatchRenorm2d(4, device=case.device), case.draw().requires_grad_()
    (dx,) = torch.autograd.grad((norm(x) * case.draw()).sum(), x, create_graph=True)
    total = dx.square().sum()
    case.named.clear()
    return case.watched(lambda: torch.autograd.grad(total, x), x.numel())


def ensemble(case: Case) -> set[str]:
    layers = [renorm.BatchRenorm2d(4, device=case.device) for _ in range(2)]
    state, x = stack_module_state(layers), case.draw()  # type: ignore[arg-type]

    def loss(parameters: Any, buffers: Any) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (x,)).square().mean()

    return case.watched(lambda: vmap(grad(loss))(*state), x.numel())


def tangents(case: Case) -> set[str]:
    norm, x = renorm.BatchRenorm2d(4, device=case.device), case.draw()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return case.watched(lambda: norm(dual), x.numel())


def traced(training: bool) -> Callable[[Case], set[str]]:
    def run(case: Case) -> set[str]:
        norm, x = renorm.BatchRenorm2d(4).train(training), case.draw()
        return {node.kind() for node in torch.jit.trace(norm, x, check_trace=False).graph.nodes()}

    return run


def exported(training: bool, **settings: Any) -> Callable[[Case], set[str]]:
    def run(case: Case) -> set[str]:
        norm, x = renorm.BatchRenorm2d(4, **settings).train(training), case.draw()
        nodes = torch.export.export(norm, (x,)).graph.nodes
        names = {node.target.name() for node in nodes if isinstance(node.target, torch._ops.OpOverload)}
        assert not [name for name in names if name.startswith("renorm::")]  # a graph may have them beside others
        return names

    return run


class Two(Workers):
    """A worker beside whom another has the same."""

    number = 2  # type: ignore[assignment]
    rank = 0  # type: ignore[assignment]

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor])

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


def of_workers(*args: Any, **settings: Any) -> renorm.Norm:
    norm = renorm.BatchRenorm2d(*args, **settings)
    norm.synchronize("batch", Two())
    return norm


def refused(message: str, run: Callable[[Case], Any]) -> Callable[[Case], set[str]]:
    """What ends in an error that says so."""

    def ask(case: Case) -> set[str]:
        with pytest.raises(RuntimeError, match=message):
            run(case)
        return {REFUSED}

    return ask


def twice_over_workers(case: Case) -> None:
    x = case.draw().requires_grad_()
    (dx,) = torch.autograd.grad(of_workers(4, device=case.device)(x).sin().sum(), x, create_graph=True)
    dx.sum().backward()


def twice_compiled(case: Case) -> None:
    x = case.draw().requires_grad_()
    y = torch.compile(renorm.BatchRenorm2d(4), backend="aot_eager")(x)
    torch.autograd.grad(y.sin().sum(), x, create_graph=True)[0].sum().backward()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


Ask = Callable[[Case], set[str]]
# By the page's rows, what each is derived from.
ROWS: dict[str, list[Ask]] = {
    "a batch: 1d, 2d, 3d, channels_last, float32, float64": [
        train(), train(limits=renorm.Limits(start=0)), train(renorm.BatchRenorm1d, (6, 4)),
        train(renorm.BatchRenorm1d, (6, 4, 5)), train(renorm.BatchRenorm3d, (6, 4, 3, 3, 3)),
        train(layout=channels_last), train(dtype=torch.float64),
    ],
    "the same in `accumulate`, `freeze`, time steps of a recurrent layer; no running statistics": [
        train(around=renorm.accumulate), train(around=renorm.freeze), recurrent(masked=False),
        train(renorm.BatchNorm2d, track_running_stats=False),
    ],
    "activation, residual": [
        train(act="relu"), train(options=added), train(options=added, act="silu"), train(options=added_in_double),
    ],
    "float16, bfloat16; other memory layouts (copied)": [
        train(dtype=torch.bfloat16), train(dtype=torch.float16), train(layout=lambda x: x.transpose(2, 3)),
    ],
    "mask, groups of examples, groups of channels, masked time steps": [
        train(options=masked), train(renorm.BatchRenorm3d, (6, 4, 3, 3, 3), options=masked),
        train(options=masked, act="relu", examples_per_group=2), train(examples_per_group=2),
        train(channels_per_group=2), recurrent(masked=True),
    ],
    "the running statistics' move, by any rule": [moved("std"), moved("var"), moved("total")],
    '`sync="batch"`': [train(of_workers)],
    "second derivatives": [twice],
    'second derivatives with `sync="batch"`': [refused("once_differentiable", twice_over_workers)],
    "torch.func's transforms": [ensemble],
    "forward-mode AD, torch.jit.trace": [tangents, traced(True)],
    "torch.export, ONNX": [exported(True)],
    "evaluation": [evaluate()],
    "with activation, residual, mask, groups of channels": [
        evaluate(act="relu"), evaluate(added), evaluate(masked), evaluate(channels_per_group=2),
    ],
    "with an example weight": [evaluate(example_weight=0.1), evaluate(masked, example_weight=0.1)],
    "for gradients; `freeze(statistics=\"running\")`": [
        train(evaluate=True), train(evaluate=True, act="relu"), train(evaluate=True, options=masked),
        train(evaluate=True, channels_per_group=2),
        train(around=lambda norm: renorm.freeze(norm, statistics="running")),
    ],
    "for gradients, with an example weight": [train(evaluate=True, example_weight=0.1)],
    "evaluation under torch.export, ONNX, torch.jit.trace": [exported(False), traced(False)],
    "the same with an example weight": [exported(False, example_weight=0.1)],
    "torch.jit.script": [
        refused("torch.jit.script does not take", lambda _: torch.jit.script(renorm.BatchRenorm2d(4)))
    ],
}  # fmt: skip
# What tells nothing of a GPU that is not there: the choice is that of a CPU without kernels.
AS_WITHOUT_KERNELS = (
    "second derivatives", 'second derivatives with `sync="batch"`', "torch.export, ONNX",
    "evaluation under torch.export, ONNX, torch.jit.trace", "the same with an example weight",
    "forward-mode AD, torch.jit.trace", "torch.func's transforms",
)  # fmt: skip


def table() -> dict[str, list[str]]:
    """The cells of the page, by row."""
    page = PAGE.read_text(encoding="utf-8")
    section = page[page.index("## Who computes what") :]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    header, _, *rows = lines
    assert [name.replace("`", "") for name in header[1:]] == list(COLUMNS)
    return {name: cells for name, *cells in rows}


def test_the_page_has_these_rows() -> None:
    assert list(table()) == list(ROWS)


@pytest.fixture
def case(column: str, row: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """A column's backend."""
    has_kernels = column in ("CPU", "GPU, RENORM_GPU=triton", "torch.compile")
    if has_kernels and not backends.available["cpu"]:
        pytest.skip("the C++ kernels are not built")
    monkeypatch.setitem(backends.available, "cpu", has_kernels)
    monkeypatch.setitem(backends.available, "cuda", False)
    is_gpu = column == "GPU" and row not in AS_WITHOUT_KERNELS
    case = Case("cuda" if is_gpu else "cpu")
    if column == "GPU, RENORM_GPU=triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(kernels, "_OPS", interpreted(case.named))
    if not is_gpu:
        yield case
        return
    stand_in(monkeypatch, case.named)
    with FakeTensorMode():
        yield case


def interpreted(named: set[str]) -> Any:
    """The operations by Triton, on the CPU."""
    launch = import_module("renorm.ops.triton.launch")

    def operation(name: str, arguments: Any) -> Any:
        def call(*flat: Any) -> Any:
            named.add(f"renorm::{name}")
            with _disable_current_modes():
                return getattr(launch, name.removesuffix("_eager"))(*arguments(*flat).read())

        return SimpleNamespace(default=call)

    return SimpleNamespace(**{name: operation(name, arguments) for name, arguments in schema._ARGUMENTS.items()})


def stand_in(monkeypatch: pytest.MonkeyPatch, named: set[str]) -> None:
    """What CUDA alone has, for tensors that are not there."""

    def statistics(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
        named.add("aten::batch_norm_stats")
        return tuple(torch.empty(x.shape[1], device=x.device) for _ in range(2))

    monkeypatch.setattr(torch, "batch_norm_stats", statistics)
    monkeypatch.setattr(torch, "batch_norm_elemt", lambda x, *_: torch.empty_like(x))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", [column for column in COLUMNS if column != "torch.compile"])
def test_a_cell_is_what_the_code_does(row: str, column: str, case: Case) -> None:
    expected = table()[row][COLUMNS.index(column)]
    for i, ask in enumerate(ROWS[row]):
        case.named.clear()
        assert who(ask(case)) == expected, i


# torch.compile asks the same questions while it traces; that it gets these answers is tested in test_kernels.py and
# test_compile.py.
NEVER_COMPILED = ("forward-mode AD, torch.jit.trace", "torch.export, ONNX", "torch.jit.script")
COMPILED: dict[str, list[Ask]] = {
    row: asks for row, asks in ROWS.items()
    if row not in (*NEVER_COMPILED, *AS_WITHOUT_KERNELS)
}  # fmt: skip
COMPILED["second derivatives"] = [refused("does not currently support double backward", twice_compiled)]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("column", ["torch.compile"])
@pytest.mark.parametrize("row", COMPILED)
def test_a_compiled_cell_is_what_the_code_does(
    row: str, column: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = table()[row][COLUMNS.index(column)]
    if expected != REFUSED:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for i, ask in enumerate(COMPILED[row]):
        assert who(ask(case)) == expected, i


def test_what_is_never_compiled_has_no_cell() -> None:
    cells = {row: cells[-1] for row, cells in table().items()}
    assert {row for row, cell in cells.items() if cell == ""} == {row for row in ROWS if row not in COMPILED} - {
        "torch.func's transforms"
    }
    assert cells["torch.func's transforms"] == OPERATIONS  # test_an_ensemble_under_vmap_compiles
