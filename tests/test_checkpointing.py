"""Activation checkpointing: the recomputed forward sees the first one's statistics, which move once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import renorm

pytestmark = pytest.mark.usefixtures("each_backend")

LIMITS = renorm.Limits(r_max=3.0, d_max=5.0, start=0, r_end=20, d_end=10)
OPTIONS: dict[str, dict[str, Any]] = {
    "renorm": {"limits": LIMITS, "tracking": "std"},
    "batch norm": {},
    "ghost renorm": {"limits": LIMITS, "examples_per_group": 2, "tracking": "total"},
    "cumulative": {"limits": LIMITS, "momentum": None},
}
settings = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
reentrant = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])


class Tower(nn.Module):
    """Three blocks with a layer each, the last of which is called twice; `run` says how a block is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        options = {"momentum": 0.3, **options}
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 5), renorm.Norm(5, **options), nn.Tanh()) for _ in range(3)
        )
        self.run: Callable[..., Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[-1]):
            x = self.run(block, x)
        return x


def trained(tower: nn.Module, steps: int = 3, forwards: int = 2) -> list[Tensor]:
    """Losses, gradients and buffers of some steps with several forwards each."""
    generator = torch.Generator().manual_seed(1)
    optimizer, record = torch.optim.SGD(tower.parameters(), 0.1), []
    for _ in range(steps):
        batches = [torch.randn(6, 5, generator=generator).mul_(2).requires_grad_() for _ in range(forwards)]
        loss = sum(tower(x).square().sum() for x in batches)
        optimizer.zero_grad()
        loss.backward()
        record += [loss.detach(), *(x.grad for x in batches), *(p.grad.clone() for p in tower.parameters())]
        record += [buffer.clone() for buffer in tower.buffers()]
        optimizer.step()
    return record


def assert_same(record: list[Tensor], expected: list[Tensor]) -> None:
    assert len(record) == len(expected)
    for actual, reference in zip(record, expected, strict=True):
        assert torch.equal(actual, reference)


@pytest.fixture
def towers(options: dict[str, Any]) -> tuple[Tower, list[Tensor]]:
    """A tower, and what a twin of it gives without checkpoints."""
    tower = Tower(**options)
    return tower, trained(copy.deepcopy(tower))


@settings
@reentrant
def test_nothing_changes_bit_for_bit(towers: tuple[Tower, list[Tensor]], use_reentrant: bool) -> None:
    tower, expected = towers
    tower.run = partial(checkpoint, use_reentrant=use_reentrant)
    assert_same(trained(tower), expected)


@settings
@reentrant
def test_one_checkpoint_around_everything(options: dict[str, Any], use_reentrant: bool) -> None:
    tower = Tower(**options)
    plain, forward = copy.deepcopy(tower), tower.forward
    tower.forward = lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)  # type: ignore[method-assign]
    # A reentrant region adds to gradients by itself, so that several would add in another order.
    assert_same(trained(tower, forwards=1), trained(plain, forwards=1))


@settings
@pytest.mark.parametrize("inner", [True, False], ids=["reentrant inside", "non-reentrant inside"])
@pytest.mark.parametrize("outer", [True, False], ids=["reentrant outside", "non-reentrant outside"])
def test_checkpoints_in_checkpoints(towers: tuple[Tower, list[Tensor]], inner: bool, outer: bool) -> None:
    tower, expected = towers

    def nested(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(partial(checkpoint, block, use_reentrant=inner), x, use_reentrant=outer)

    tower.run = nested
    assert_same(trained(tower), expected)


@settings
@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl.NO_REENTRANT:FutureWarning")
@pytest.mark.parametrize("variant", list(CheckpointImpl), ids=lambda variant: variant.name.lower())
def test_the_wrapper_of_fsdp(towers: tuple[Tower, list[Tensor]], variant: CheckpointImpl) -> None:
    tower, expected = towers
    for i, block in enumerate(tower.blocks):
        tower.blocks[i] = checkpoint_wrapper(block, variant)
    assert_same(trained(tower), expected)


@settings
def test_the_composable_checkpoint(towers: tuple[Tower, list[Tensor]]) -> None:
    tower, expected = towers
    for block in tower.blocks:
        composable_checkpoint(block)
    assert_same(trained(tower), expected)


@settings
@pytest.mark.parametrize("early_stop", [True, False])
def test_with_and_without_stopping_early(towers: tuple[Tower, list[Tensor]], early_stop: bool) -> None:
    tower, expected = towers
    tower.run = partial(checkpoint, use_reentrant=False)
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        assert_same(trained(tower), expected)


@settings
def test_a_graph_that_is_kept_recomputes_twice(options: dict[str, Any]) -> None:
    tower = Tower(**options)
    plain = copy.deepcopy(tower)
    tower.run = partial(checkpoint, use_reentrant=False)
    x = torch.randn(6, 5)
    found = []
    for model in (tower, plain):
        loss = model(x).square().sum()
        model(x + 1)  # the statistics move on
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert_same(*found)


@settings
@reentrant
def test_regions_are_told_apart_when_only_the_first_is_differentiated(
    options: dict[str, Any], use_reentrant: bool
) -> None:
    tower = Tower(**options)
    plain = copy.deepcopy(tower)
    tower.run = partial(checkpoint, use_reentrant=use_reentrant)
    found = []
    for model in (tower, plain):
        x = torch.linspace(-1, 1, 30).reshape(6, 5).requires_grad_()
        first, _ = model(x), model(x)  # the same input twice: only the region tells them apart
        first.sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert_same(*found)


@reentrant
def test_sequential_checkpoints_of_a_converted_network(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1), nn.BatchNorm2d(4)) for i in range(4)]
    model = renorm.convert(nn.Sequential(*blocks), renorm.BatchRenorm, limits=LIMITS)
    plain = copy.deepcopy(model)
    found = []
    for network, segments in ((model, 2), (plain, 0)):
        x = torch.linspace(-1, 1, 6 * 3 * 25).reshape(6, 3, 5, 5).requires_grad_()
        y = checkpoint_sequential(network, segments, x, use_reentrant=use_reentrant) if segments else network(x)
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for p in network.parameters()), *network.buffers()])
    assert_same(*found)


def test_the_checkpoints_of_timm() -> None:
    torch.manual_seed(0)
    model = renorm.convert(timm.create_model("resnet10t", num_classes=3), renorm.BatchRenorm, limits=LIMITS)
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing(True)
    x = torch.randn(4, 3, 32, 32)
    found = []
    for network in (model, plain):
        for _ in range(2):
            network.zero_grad()
            network(x).square().sum().backward()
        found.append([*(p.grad for p in network.parameters()), *network.buffers()])
    assert_same(*found)


BLOCKS: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "frozen": renorm.freeze,
    "frozen to running statistics": partial(renorm.freeze, statistics="running"),
    "accumulating": renorm.accumulate,
    "ordinary": lambda model: nullcontext(),
}


@reentrant
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_recomputation_after_the_block_repeats_what_the_block_did(
    block: Callable[[nn.Module], AbstractContextManager[None]], use_reentrant: bool
) -> None:
    tower = Tower(limits=LIMITS, tracking="std")
    tower(torch.randn(6, 5) * 3)
    plain = copy.deepcopy(tower)
    tower.run = partial(checkpoint, use_reentrant=use_reentrant)
    found = []
    for model in (tower, plain):
        x = torch.linspace(-1, 1, 30).reshape(6, 5).requires_grad_()
        with block(model):
            loss = model(x).square().sum()
        model(x * 2)
        loss.backward()
        found.append([x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert_same(*found)


class OwnCheckpoint(torch.autograd.Function):
    """A reentrant checkpoint as other libraries write it."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


@settings
def test_reentrant_checkpoints_of_other_libraries(towers: tuple[Tower, list[Tensor]]) -> None:
    tower, expected = towers
    tower.run = OwnCheckpoint.apply
    assert_same(trained(tower), expected)


def with_a_hook(tower: Tower, x: Tensor) -> Tensor:
    """A recomputation that nobody can know of: the forward is called again by a gradient's hook."""
    y = tower(x)

    def again(gradient: Tensor) -> None:
        tower(x)

    y.register_hook(again)
    return y


def test_an_unknown_recomputation_is_refused_where_the_statistics_matter() -> None:
    tower = Tower(limits=LIMITS)
    with pytest.raises(RuntimeError, match=r"inside a backward pass, .*`with renorm.accumulate\(model\):`"):
        with_a_hook(tower, torch.randn(6, 5)).sum().backward()
    assert all(layer.num_batches_tracked <= 2 for layer in tower.modules() if isinstance(layer, renorm.Norm))


def test_an_unknown_recomputation_moves_nothing_where_they_do_not() -> None:
    tower = Tower()
    with_a_hook(tower, torch.randn(6, 5)).sum().backward()
    assert [block[1].num_batches_tracked.item() for block in tower.blocks] == [1, 1, 2]


def test_accumulating_is_the_remedy_for_unknown_recomputations() -> None:
    tower, plain = Tower(limits=LIMITS), None
    plain = copy.deepcopy(tower)
    x = torch.randn(6, 5)
    with renorm.accumulate(tower):
        with_a_hook(tower, x).sum().backward()
    with renorm.accumulate(plain):
        plain(x).sum().backward()
    assert_same([*tower.buffers()], [*plain.buffers()])


def test_what_a_region_saw_is_forgotten_with_its_graph() -> None:
    import gc
    import weakref

    layer = renorm.BatchRenorm1d(5)
    y = checkpoint(nn.Sequential(nn.Linear(5, 5), layer), torch.randn(6, 5), use_reentrant=False)
    gone = weakref.ref(layer)
    del layer
    assert gone() is not None
    del y
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("checkpointed", [False, True])
def test_functions_called_forward_may_do_what_they_like_with_their_arguments(checkpointed: bool) -> None:
    layer = renorm.BatchRenorm1d(5)

    def forward(x: Tensor) -> Tensor:
        h = x * 2
        del x
        return layer(h)

    x = torch.randn(6, 5, requires_grad=True)
    with torch.no_grad():
        forward(x)
    if checkpointed:
        checkpoint(forward, x, use_reentrant=True).sum().backward()
    assert layer.num_batches_tracked == 1 + checkpointed


def test_hooks_that_are_no_checkpoint_change_nothing() -> None:
    tower = Tower(limits=LIMITS)
    expected = trained(copy.deepcopy(tower))
    with torch.autograd.graph.save_on_cpu():
        assert_same(trained(tower), expected)


def _torch_moves_twice() -> bool:
    block = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())
    compiled = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), backend="aot_eager")
    compiled(torch.randn(6, 5, requires_grad=True)).sum().backward()
    return int(block[1].num_batches_tracked) == 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("accumulates", [False, True], ids=["ordinary", "accumulating"])
def test_a_checkpoint_inside_of_compiled_code(accumulates: bool) -> None:
    """The compiler recomputes by itself, from statistics that have moved unless the step accumulates."""
    if not accumulates and _torch_moves_twice():
        pytest.skip("this torch moves nn.BatchNorm's statistics twice too")
    tower = Tower(limits=LIMITS)
    plain = copy.deepcopy(tower)
    tower.run = partial(checkpoint, use_reentrant=False)
    compiled = torch.compile(tower, backend="aot_eager")
    found = []
    for model, network in ((compiled, tower), (plain, plain)):
        x = torch.linspace(-2, 2, 30).reshape(6, 5).requires_grad_()
        with renorm.accumulate(network) if accumulates else nullcontext():
            y = model(x)
            y.square().sum().backward()
        gradients = [x.grad, *(p.grad for p in network.parameters())] if accumulates else []
        found.append([y.detach(), *network.buffers(), *gradients])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
