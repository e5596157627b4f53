"""Blocks that accumulate or freeze: when the running statistics move, by how much, and that nothing is left behind."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from oracle import Oracle, Ramps
from torch import Tensor, nn

import renorm

pytestmark = pytest.mark.usefixtures("each_backend")

LIMITS = renorm.Limits(r_max=3.0, d_max=5.0, start=0, r_end=4, d_end=3)
OPTIONS: dict[str, dict[str, Any]] = {
    "batch norm": {"momentum": 0.3},
    "renorm": {"limits": LIMITS, "tracking": "std", "momentum": 0.3},
    "total": {"tracking": "total", "momentum": 0.3},
    "cumulative": {"momentum": None, "limits": LIMITS},
    "ghost": {"examples_per_group": 2, "tracking": "std"},
    "batch-group": {"examples_per_group": 2, "channels_per_group": 2, "tracking": "total"},
}
settings = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
BLOCKS: dict[str, Callable[..., AbstractContextManager[None]]] = {
    "accumulate": renorm.accumulate,
    "freeze": renorm.freeze,
    "freeze to running statistics": partial(renorm.freeze, statistics="running"),
}
each_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def buffers(module: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@settings
def test_micro_batches_move_the_statistics_once_as_groups_of_one_batch(options: dict[str, Any]) -> None:
    size = options.get("examples_per_group", 4)
    layer = renorm.Norm(4, **options)
    whole = renorm.Norm(4, **{**options, "examples_per_group": size})
    for step in range(3):
        batches = torch.randn(5, 4, 4, 3) * (step + 1) + step
        with renorm.accumulate(layer):
            outputs = [layer(batch) for batch in batches]
        expected = whole(batches.flatten(0, 1))
        torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(buffers(layer), buffers(whole), rtol=1e-5, atol=1e-6)
    assert layer.num_batches_tracked == 3


def test_the_paper_s_fifty_workers_in_one_process() -> None:
    """50 microbatches of 32, each with statistics over 4 examples, against one batch of 1,600."""
    options: dict[str, Any] = {"limits": LIMITS, "tracking": "std", "examples_per_group": 4}
    workers, whole = renorm.Norm(3, **options), renorm.Norm(3, **options)
    for _ in range(2):
        x = torch.randn(1_600, 3, requires_grad=True)
        with renorm.accumulate(workers):
            y = torch.cat([workers(part) for part in x.split(32)])
        expected = whole(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        gradients = (torch.autograd.grad(out.square().sum(), (x, layer.weight)) for out, layer in
                     ((y, workers), (expected, whole)))  # fmt: skip
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(buffers(workers), buffers(whole), rtol=1e-5, atol=1e-6)


def test_micro_batches_of_unequal_size_weigh_by_their_count() -> None:
    layer = renorm.Norm(2, momentum=1.0, tracking="total")
    sizes = [3, 1, 7]
    batches = [torch.randn(size, 2, 5) + size for size in sizes]
    masks = [torch.rand(size, 5) > 0.3 for size in sizes]
    with renorm.accumulate(layer):
        for batch, mask in zip(batches, masks, strict=True):
            layer(batch, mask)
    counted = torch.cat([batch.movedim(1, -1)[mask] for batch, mask in zip(batches, masks, strict=True)])
    torch.testing.assert_close(layer.running_mean, counted.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, counted.var(0, unbiased=False), rtol=1e-4, atol=1e-4)


def test_accumulation_agrees_with_an_independent_implementation() -> None:
    layer = renorm.BatchRenorm1d(3, limits=LIMITS, momentum=0.2)
    oracle = Oracle(3, limits=Ramps(3.0, 5.0, 0, 4, 3), tracking="std", momentum=0.2, examples_per_group=4)
    for _ in range(6):
        x = torch.randn(12, 3) * 2 + 1
        with renorm.accumulate(layer):
            y = torch.cat([layer(part) for part in x.split(4)])
        torch.testing.assert_close(y.double(), oracle.train(x.double()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.running_mean.double(), oracle.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), oracle.var, rtol=1e-5, atol=1e-6)


def test_a_micro_batch_that_is_not_finite_is_left_out_and_counted() -> None:
    layer, untroubled = renorm.BatchRenorm1d(3), renorm.BatchRenorm1d(3)
    x = torch.randn(3, 4, 3)
    with renorm.accumulate(layer), renorm.accumulate(untroubled):
        for batch in x:
            layer(batch), untroubled(batch)
        layer(torch.full((4, 3), math.nan))
        layer(torch.full((4, 3), math.inf))
    assert_equal(buffers(layer)[:3], buffers(untroubled)[:3])
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (1, 2)


@pytest.mark.parametrize("batches", [[], [0], [0, 0]], ids=str)
def test_a_block_without_an_example_moves_nothing(batches: list[int]) -> None:
    layer = renorm.BatchRenorm1d(3)
    before = buffers(layer)
    with renorm.accumulate(layer):
        for size in batches:
            layer(torch.randn(size, 3))
    assert_equal(buffers(layer), before)


def test_a_single_forward_in_a_block_is_as_without_it() -> None:
    layer, plain = renorm.GhostBatchNorm2d(4, 2), renorm.GhostBatchNorm2d(4, 2)
    x = torch.randn(6, 4, 3, 3)
    with renorm.accumulate(layer):
        y = layer(x)
    assert torch.equal(y, plain(x))
    assert_equal(buffers(layer), buffers(plain))


def test_the_outermost_block_moves_the_statistics() -> None:
    nested, flat = renorm.BatchRenorm1d(3), renorm.BatchRenorm1d(3)
    x = torch.randn(4, 5, 3)
    with renorm.accumulate(nested):
        before = buffers(nested)
        with renorm.accumulate(nested):
            nested(x[0]), nested(x[1])
        assert_equal(buffers(nested), before)
        nested(x[2])
        with pytest.raises(ValueError, match="num_features"), renorm.accumulate(nested):
            nested(x[3] * 1_000), nested(x[3, :, :2])
    with renorm.accumulate(flat):
        flat(x[0]), flat(x[1]), flat(x[2])
    assert_equal(buffers(nested), buffers(flat))


@each_block
def test_an_error_in_a_block_moves_nothing_and_leaves_nothing_behind(
    block: Callable[..., AbstractContextManager[None]],
) -> None:
    layer, plain = renorm.BatchRenorm1d(3), renorm.BatchRenorm1d(3)
    with pytest.raises(ValueError, match="num_features"), block(layer):
        layer(torch.randn(4, 3)), layer(torch.randn(4, 2))
    x = torch.randn(4, 3)
    assert torch.equal(layer(x), plain(x))
    assert_equal(buffers(layer), buffers(plain))


@settings
def test_freezing_normalizes_as_in_training_and_moves_nothing(options: dict[str, Any]) -> None:
    layer = renorm.Norm(4, **options)
    layer(torch.randn(6, 4, 3) * 2 + 1)
    twin, before = copy.deepcopy(layer), buffers(layer)
    x = torch.randn(6, 4, 3)
    for _ in range(2):
        with renorm.freeze(layer):
            assert torch.equal(layer(x), copy.deepcopy(twin)(x))
    assert_equal(buffers(layer), before)
    assert layer.training


@settings
@pytest.mark.parametrize("example_weight", [0.0, 0.3])
def test_freezing_to_running_statistics_is_evaluation_with_gradients(
    options: dict[str, Any], example_weight: float
) -> None:
    layer = renorm.Norm(4, example_weight=example_weight, act="relu", **options)
    layer(torch.randn(6, 4, 3) * 2 + 1)
    evaluating, before = copy.deepcopy(layer).eval(), buffers(layer)
    x = torch.randn(6, 4, 3, requires_grad=True)
    with renorm.freeze(layer, statistics="running"):
        y = layer(x)
    assert torch.equal(y, evaluating(x))
    assert_equal(buffers(layer), before)
    layer(torch.randn(6, 4, 3))  # the statistics move between forward and backward
    found = torch.autograd.grad(y.sum(), (x, layer.weight))
    assert_equal(list(found), list(torch.autograd.grad(evaluating(x).sum(), (x, evaluating.weight))))


def test_blocks_in_blocks_undo_themselves_in_turn() -> None:
    layer = renorm.BatchRenorm1d(3, limits=LIMITS)
    layer(torch.randn(8, 3) * 3 + 1)
    x = torch.randn(8, 3)
    by_running = copy.deepcopy(layer).eval()(x)
    by_batch = copy.deepcopy(layer)(x)
    before = buffers(layer)
    with renorm.freeze(layer):
        with renorm.freeze(layer, statistics="running"):
            assert torch.equal(layer(x), by_running)
            with renorm.freeze(layer), renorm.accumulate(layer):
                assert torch.equal(layer(x), by_batch)
            assert torch.equal(layer(x), by_running)
        assert torch.equal(layer(x), by_batch)
    assert_equal(buffers(layer), before)
    layer(x)
    assert layer.num_batches_tracked == 2


def test_what_is_frozen_in_an_accumulation_does_not_count() -> None:
    layer, plain = renorm.BatchRenorm1d(3), renorm.BatchRenorm1d(3)
    x = torch.randn(2, 5, 3)
    with renorm.accumulate(layer):
        layer(x[0])
        with renorm.freeze(layer):
            layer(x[1])
    plain(x[0])
    assert_equal(buffers(layer), buffers(plain))


def test_several_models_and_shared_layers_are_concerned_once() -> None:
    shared = renorm.BatchRenorm1d(3)
    tower, other = nn.Sequential(shared, nn.ReLU(), shared), nn.Sequential(shared, renorm.BatchNorm1d(3))
    with renorm.accumulate(tower, other):
        tower(torch.randn(4, 3)), other(torch.randn(4, 3))
    assert shared.num_batches_tracked == other[1].num_batches_tracked == 1


@each_block
def test_modules_of_other_kinds_and_layers_without_statistics_are_left_alone(
    block: Callable[..., AbstractContextManager[None]],
) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), renorm.BatchNorm1d(3, track_running_stats=False))
    x = torch.randn(4, 3)
    with block(model):
        y = model(x)
    assert model[0].num_batches_tracked == 1
    assert torch.equal(y, model(x))


@each_block
def test_a_model_without_a_layer_of_ours_is_warned_about_if_it_has_torch_s(
    block: Callable[..., AbstractContextManager[None]],
) -> None:
    with pytest.warns(UserWarning, match="torch's batch norm layers go on as ever") as caught, block(nn.BatchNorm1d(3)):
        pass
    assert caught[0].filename == __file__
    with block(nn.Identity()), block(nn.BatchNorm1d(3).eval()):
        pass


@each_block
def test_a_list_of_models_is_refused(block: Callable[..., AbstractContextManager[None]]) -> None:
    with pytest.raises(TypeError, match="models must be modules, one by one, got list"), block([nn.Identity()]):
        pass


def test_unknown_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="statistics must be 'batch' or 'running', got 'ema'"):
        renorm.freeze(nn.Linear(1, 1), statistics="ema").__enter__()


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: torch.load(save(module), weights_only=False),
    "averaged": lambda module: torch.optim.swa_utils.AveragedModel(module).module,
}


def save(module: nn.Module) -> io.BytesIO:
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    return file


@each_block
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_made_in_a_block_is_outside_of_it(
    block: Callable[..., AbstractContextManager[None]], copied: Callable[[nn.Module], nn.Module]
) -> None:
    layer = renorm.BatchRenorm1d(3)
    with block(layer):
        layer(torch.randn(4, 3))
        twin = copied(layer)
        twin(torch.randn(4, 3))
        assert (twin.num_batches_tracked, layer.num_batches_tracked) == (1, 0)


def test_a_state_dict_in_a_block_holds_the_statistics_from_before() -> None:
    layer = renorm.BatchRenorm1d(3)
    layer(torch.randn(4, 3))
    before = copy.deepcopy(layer.state_dict())
    with renorm.accumulate(layer):
        layer(torch.randn(4, 3))
        assert_equal(list(layer.state_dict().values()), list(before.values()))
        layer.load_state_dict(before)
    assert layer.num_batches_tracked == 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@each_block
def test_blocks_around_compiled_layers(block: Callable[..., AbstractContextManager[None]]) -> None:
    layer = nn.Sequential(renorm.BatchRenorm1d(3, limits=LIMITS, momentum=0.3))
    eager = copy.deepcopy(layer)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(3, 8, 3) * 2
        with block(layer), block(eager):
            for batch in x[:2]:
                torch.testing.assert_close(fast(batch), eager(batch), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fast(x[2]), eager(x[2]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(buffers(layer), buffers(eager), rtol=1e-5, atol=1e-6)


def train_until(model: nn.Module, freeze: renorm.LateFreeze, batches: list[Tensor]) -> list[bool]:
    frozen = []
    for batch in batches:
        model(batch)
        frozen.append(freeze.step())
    return frozen


@pytest.mark.parametrize("at", [0, 1, 7, 30])
def test_a_late_freeze_holds_from_its_step_on(at: int) -> None:
    batches = list(torch.randn(40, 8, 3))
    model, expected = nn.Sequential(renorm.BatchNorm1d(3)), nn.Sequential(renorm.BatchNorm1d(3))
    frozen = train_until(model, renorm.LateFreeze(model, at), batches)
    for batch in batches[:at]:
        expected(batch)
    assert frozen == [step >= at for step in range(1, 41)]
    assert_equal(buffers(model.train()), buffers(expected))
    torch.testing.assert_close(model(batches[0]), expected.eval()(batches[0]))


def test_a_training_resumed_from_a_state_dict_alone_freezes_at_the_same_step() -> None:
    batches = list(torch.randn(12, 8, 3))
    model = nn.Sequential(renorm.BatchRenorm1d(3, limits=LIMITS))
    freeze = renorm.LateFreeze(model, at=8)
    for number in range(13):
        again = nn.Sequential(renorm.BatchRenorm1d(3, limits=LIMITS))
        again.load_state_dict(copy.deepcopy(model.state_dict()))
        train_until(again, renorm.LateFreeze(again, at=8), batches[number:])
        assert again[0].frozen == "running"
        assert int(again[0].num_batches_tracked) == 8
        if number < 12:
            train_until(model, freeze, batches[number : number + 1])
    assert_equal(buffers(model), buffers(again))


def test_layers_that_are_called_several_times_a_step_freeze_by_their_own_count() -> None:
    model = nn.ModuleList([renorm.BatchNorm1d(3), renorm.BatchNorm1d(3)])
    freeze = renorm.LateFreeze(model, at=20)
    for step in range(1, 21):
        for _ in range(4):
            model[0](torch.randn(8, 3))
        model[1](torch.randn(8, 3))
        assert freeze.step() == (step == 20)
        assert model[0].frozen == (None if step < 5 else "running")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_a_compiled_model_freezes_late() -> None:
    model = nn.Sequential(renorm.BatchNorm1d(3))
    eager = copy.deepcopy(model)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    both = renorm.LateFreeze(fast, at=2), renorm.LateFreeze(eager, at=2)
    for x in torch.randn(4, 8, 3):
        torch.testing.assert_close(fast(x), eager(x), rtol=1e-5, atol=1e-5)
        assert both[0].step() == both[1].step()
    assert int(model[0].num_batches_tracked) == 2


def test_a_late_freeze_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer of renorm"):
        renorm.LateFreeze(nn.Sequential(nn.BatchNorm1d(3)), at=2)
    with pytest.raises(ValueError, match="at must be a step of at least 0, got -1"):
        renorm.LateFreeze(nn.Sequential(renorm.BatchNorm1d(3)), at=-1)


def test_joint_forward_and_two_accumulated_ones_agree_on_the_statistics() -> None:
    """CrossQ's joint forward of states and next states, against one forward each."""
    joint, apart = renorm.BatchNorm1d(3, tracking="total"), renorm.BatchNorm1d(3, tracking="total")
    states, following = torch.randn(8, 3), torch.randn(8, 3) + 1
    joint(torch.cat((states, following)))
    with renorm.accumulate(apart):
        apart(states), apart(following)
    torch.testing.assert_close(buffers(apart), buffers(joint), rtol=1e-5, atol=1e-6)


def test_the_average_of_a_model_includes_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 3), renorm.BatchRenorm1d(3, limits=LIMITS, momentum=0.3))
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    expected = None
    for _ in range(3):
        model(torch.randn(4, 3))
        average.update_parameters(model)
        mean = model[1].running_mean
        expected = mean.clone() if expected is None else torch.lerp(mean, expected, 0.5)
    torch.testing.assert_close(average.module[1].running_mean, expected)
    assert not average.eval()(torch.randn(4, 3)).isnan().any()
