"""Statistics over several processes: against one process, against each other, and with everything DDP can do."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import renorm

from . import cases
from .crew import Crew

OPTIONS: dict[str, dict[str, Any]] = {
    "batch norm": {},
    "renorm": {"limits": renorm.Limits.constant(1.2, 0.3), "tracking": "std"},
    "total": {"tracking": "total", "momentum": None},
    "batch-group renorm": {"limits": renorm.Limits.constant(), "channels_per_group": 2, "tracking": "std"},
    "activation": {"act": "silu"},
    "without parameters": {"affine": False, "limits": renorm.Limits.constant()},
    "without statistics": {"track_running_stats": False},
}
settings = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def assert_identical(found: list[list[Tensor]]) -> None:
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def assert_as_one_process(found: list[dict[str, Any]], options: dict[str, Any], sizes: list[int], masked: bool) -> None:
    model, whole = (
        cases.layer({name: value for name, value in options.items() if name != "sync"}),
        cases.batch(sum(sizes)),
    )
    for number, scale in enumerate((1.0, 2.0)):
        model.zero_grad()
        expected = cases.step(model, whole | {"x": whole["x"] * scale}, masked)
        results = [result["steps"][number] for result in found]
        for name in ("y", "dx", "dresidual"):
            assert_close(torch.cat([result[name] for result in results]), expected[name])
        for parts, gradient in zip(
            zip(*(result["parameters"] for result in results), strict=True), expected["parameters"], strict=True
        ):
            assert_close(torch.stack(parts).sum(0), gradient, rtol=1e-4)
    for result in found:
        assert_close(result["buffers"], cases.buffers(model))
    assert_identical([result["buffers"] for result in found])


def assert_as_in_eager_mode(found: list[list[dict[str, Any]]]) -> None:
    for compiled, eager in found:
        for name in ("outputs", "gradients", "buffers"):
            torch.testing.assert_close(compiled[name], eager[name], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert_identical([compiled["buffers"] for compiled, _ in found])


SIZES = {"even": [3, 3, 3, 3], "uneven": [5, 1, 4, 2], "an empty one": [4, 0, 3, 5]}


@settings
@pytest.mark.parametrize(("kind", "masked"), [("even", False), ("uneven", True), ("an empty one", True)], ids=str)
def test_one_batch_over_all_workers_equals_one_process(
    crew: Crew, options: dict[str, Any], kind: str, masked: bool
) -> None:
    sizes = SIZES[kind][: crew.number]
    found = crew.run(cases.steps, options | {"sync": "batch"}, sizes, masked)
    assert_as_one_process(found, options, sizes, masked)


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "renorm"])
def test_one_batch_agrees_with_the_formula_differentiated_by_torch(two: Crew, corrected: bool) -> None:
    options = {"limits": renorm.Limits.constant(), "tracking": "std"} if corrected else {}
    found = two.run(cases.steps, options | {"sync": "batch"}, [3, 3], False)
    whole = cases.batch(6)["x"].double().requires_grad_()
    mean, var = whole.mean((0, 2, 3), keepdim=True), whole.var((0, 2, 3), unbiased=False, keepdim=True)
    weight = torch.linspace(0.5, 1.5, 4).double()[:, None, None]
    r, d = torch.ones(4, 1, 1), torch.zeros(4, 1, 1)
    if corrected:
        sigma = (torch.linspace(0.5, 2, 4).double()[:, None, None] + 1e-5).sqrt()
        r = ((var.detach() + 1e-5).sqrt() / sigma)[0].clamp(1 / 3, 3)
        d = ((mean.detach()[0] - torch.linspace(-1, 1, 4)[:, None, None]) / sigma).clamp(-5, 5)
    y = ((whole - mean) / (var + 1e-5).sqrt() * r + d) * weight + weight + cases.batch(6)["residual"]
    (gradient,) = torch.autograd.grad((y * cases.batch(6)["target"]).sum(), whole)
    assert_close(torch.cat([result["steps"][0]["y"] for result in found]).double(), y.detach())
    assert_close(torch.cat([result["steps"][0]["dx"] for result in found]).double(), gradient)


def test_ghost_groups_of_ranks_share_a_batch_and_all_ranks_the_running_statistics(four: Crew) -> None:
    found = four.run(cases.grouped, 2)
    model = cases.layer({"limits": renorm.Limits.constant(), "tracking": "std", "examples_per_group": 6})
    expected = cases.step(model, cases.batch(12), masked=False)
    for name in ("y", "dx"):
        assert_close(torch.cat([result["steps"][0][name] for result in found]), expected[name])
    for result in found:
        assert_close(result["buffers"], cases.buffers(model))
    assert_identical([result["buffers"] for result in found])


def test_trainings_in_process_groups_of_their_own_do_not_mix(four: Crew) -> None:
    found = four.run(cases.in_process_groups)
    assert_identical(found[:2])
    assert_identical(found[2:])
    assert not torch.equal(found[0][0], found[2][0])


# --- merged running statistics --------------------------------------------------------------------------------------


def test_merged_statistics_are_those_of_microbatches_in_one_process(crew: Crew) -> None:
    """The paper's arrangement: workers with a batch each, one gradient, common running statistics."""
    found = crew.run(partial(cases.trained, "running"))
    expected = cases.simulated(crew.number)
    for result in found:
        assert_close(result["buffers"], expected["buffers"])
        assert_close(result["parameters"], expected["parameters"], rtol=1e-4)
    assert_identical([result["buffers"] for result in found])


def test_one_collective_a_step_merges_all_layers(two: Crew) -> None:
    assert [result["collectives"] for result in two.run(partial(cases.trained, "running"))] == [1, 1]
    assert [result["collectives"] for result in two.run(partial(cases.trained, "batch"))] == [6, 6]
    assert [result["collectives"] for result in two.run(partial(cases.trained, None))] == [0, 0]


DDP: dict[str, dict[str, Any]] = {
    "buffers broadcast": {"broadcast_buffers": True},
    "buffers left": {"broadcast_buffers": False},
    "static graph": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 0.001, "broadcast_buffers": False},
    "unused parameters": {"find_unused_parameters": True, "broadcast_buffers": False},
    "accumulation": {"accumulated": 3, "broadcast_buffers": False},
    "checkpoint": {"checkpointed": False, "broadcast_buffers": False},
    "reentrant checkpoint": {"checkpointed": True, "broadcast_buffers": False},
}


@pytest.mark.parametrize("options", DDP.values(), ids=DDP)
@pytest.mark.parametrize("sync", ["running", "batch"])
def test_ranks_stay_identical_under_ddp(two: Crew, sync: str, options: dict[str, Any]) -> None:
    found = two.run(partial(cases.trained, sync, **options))
    assert_identical([result["buffers"] for result in found])
    assert_identical([result["parameters"] for result in found])
    assert all(buffer == 4 for buffer in found[0]["buffers"][2::4])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sync", ["running", "batch"])
def test_checkpoints_change_nothing(two: Crew, sync: str, reentrant: bool) -> None:
    plain = two.run(partial(cases.trained, sync, broadcast_buffers=False))
    found = two.run(partial(cases.trained, sync, broadcast_buffers=False, checkpointed=reentrant))
    for result, expected in zip(found, plain, strict=True):
        assert_identical([result["buffers"], expected["buffers"]])
        assert_identical([result["parameters"], expected["parameters"]])


def test_layers_that_only_some_workers_use_are_merged(two: Crew) -> None:
    options = {"detours": True, "find_unused_parameters": True, "broadcast_buffers": False}
    found = two.run(partial(cases.trained, "running", **options))
    assert_identical([result["buffers"] for result in found])
    assert found[1]["buffers"][6] == 4  # the steps of the layer that rank 1 never used


@pytest.mark.parametrize("sync", ["running", "batch"])
def test_data_that_is_not_finite_poisons_no_other_rank(two: Crew, sync: str) -> None:
    found = two.run(partial(cases.trained, sync, broken=(1, 1), broadcast_buffers=False))
    assert_identical([result["buffers"] for result in found])
    for result in found:
        assert all(buffer.isfinite().all() for buffer in result["buffers"])
        steps, skipped = result["buffers"][2::4], result["buffers"][3::4]
        assert all(step == 4 for step in steps)
        assert skipped[0] == 1


def test_without_synchronization_ranks_differ(two: Crew) -> None:
    found = two.run(partial(cases.trained, None, broadcast_buffers=False))
    assert not torch.equal(found[0]["buffers"][0], found[1]["buffers"][0])


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("sync", [None, "running", "batch"], ids=str)
def test_sharded_models_keep_their_statistics_in_float32(two: Crew, sync: str | None, checkpointed: bool) -> None:
    found = two.run(cases.sharded, sync, checkpointed)
    for result in found:
        assert result["outputs"] == [torch.bfloat16] * 3
        assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in result["buffers"])
        assert all(steps == 3 for steps in result["buffers"][2::4])
    if sync is not None:
        assert_identical([result["buffers"] for result in found])
    if checkpointed:
        assert_identical([found[0]["buffers"], two.run(cases.sharded, sync, False)[0]["buffers"]])


def test_workers_with_unequal_numbers_of_batches_join(crew: Crew) -> None:
    assert_joined(crew.run(cases.uneven))


@pytest.mark.slow
def test_compiled_workers_with_unequal_numbers_of_batches_join(two: Crew) -> None:
    assert_joined(two.run(cases.uneven, True))


def assert_joined(found: list[dict[str, Any]]) -> None:
    assert_identical([result["buffers"] for result in found])
    assert_identical([result["parameters"] for result in found])
    assert found[0]["buffers"][2] == 1 + len(found)


def test_forwards_without_gradients_are_merged_at_once(two: Crew) -> None:
    found = two.run(cases.without_gradients)
    assert_identical(found)
    assert all(steps == 3 for steps in found[0][2::4])


def test_one_rank_may_evaluate_alone(two: Crew) -> None:
    assert two.run(cases.evaluated_on_one_rank) == [2, 2]


def test_one_rank_may_evaluate_alone_by_the_batch(two: Crew) -> None:
    (mean, var), nothing = two.run(cases.evaluated_alone_without_statistics)
    assert nothing == []
    assert (mean, var) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=1e-2))


each_sync = pytest.mark.parametrize("sync", ["running", "batch"])


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@each_sync
def test_a_compiled_layer_is_that_of_eager_mode(two: Crew, sync: str, masked: bool) -> None:
    found = two.run(cases.compiled_layer, sync, masked)
    assert_as_in_eager_mode(found)
    assert {result["collectives"] for pair in found for result in pair} == {{"running": 1, "batch": 2}[sync]}


@pytest.mark.slow
@pytest.mark.parametrize("way", cases.WAYS)
@each_sync
def test_compiled_steps_are_those_of_eager_mode(two: Crew, sync: str, way: str) -> None:
    if (way, sync) == ("recomputed", "batch"):
        pytest.skip("compiled layers cannot see that they are recomputed")
    found = two.run(cases.compiled, way, sync)
    assert_as_in_eager_mode(found)
    if way == "plain":
        assert {result["collectives"] for pair in found for result in pair} == {{"running": 1, "batch": 6}[sync]}


@pytest.mark.slow
@each_sync
def test_the_default_compiler_synchronizes_too(two: Crew, sync: str) -> None:
    assert_as_in_eager_mode(two.run(cases.compiled, "plain", sync, "inductor"))


@pytest.mark.slow
@each_sync
def test_compiled_layers_of_one_kind_share_a_graph_and_no_statistics(two: Crew, sync: str) -> None:
    found = two.run(cases.compiled_twins, sync)
    for models, graphs in found:
        assert [int(buffers[2]) for buffers in models] == [2, 3]
        assert graphs == 1
    for number in range(2):
        assert_identical([models[number] for models, _ in found])


@pytest.mark.slow
@each_sync
def test_compiled_models_keep_to_their_process_groups(four: Crew, sync: str) -> None:
    for found in four.run(cases.compiled_apart, sync):
        for compiled, eager in found:
            torch.testing.assert_close(compiled["buffers"], eager["buffers"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ghost_groups_of_ranks_compile(four: Crew) -> None:
    assert_as_in_eager_mode(four.run(partial(cases.compiled, "plain", "batch", ranks_per_group=2)))


@pytest.mark.slow
@each_sync
def test_compiled_blocks_of_sharded_models_are_those_of_eager_mode(two: Crew, sync: str) -> None:
    found = two.run(cases.sharded, sync, False, True)
    eager = two.run(cases.sharded, sync)
    assert_identical([result["buffers"] for result in found])
    for name in ("buffers", "parameters"):
        torch.testing.assert_close(found[0][name], eager[0][name], rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@each_sync
def test_compiled_ddp_is_that_of_eager_mode(two: Crew, sync: str) -> None:
    found = two.run(partial(cases.trained, sync, compiles=True))
    eager = two.run(partial(cases.trained, sync))
    assert_identical([result["buffers"] for result in found])
    assert_identical([result["parameters"] for result in found])
    for name in ("buffers", "parameters"):
        torch.testing.assert_close(found[0][name], eager[0][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_one_batch_in_other_precisions_and_layouts(two: Crew, dtype: torch.dtype, channels_last: bool) -> None:
    found = two.run(cases.in_precision, dtype, channels_last)
    layer = cases.layer({"limits": renorm.Limits.constant(), "tracking": "std"}).double()
    expected = layer(cases.batch()["x"].to(dtype).double())
    y = torch.cat([y for y, _ in found])
    assert y.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert_identical([buffers for _, buffers in found])
    torch.testing.assert_close(found[0][1][0].double(), layer.running_mean, rtol=1e-3, atol=1e-3)


def test_statistics_are_estimated_over_all_workers(two: Crew) -> None:
    found = two.run(cases.estimated)
    assert_identical(found)
    x = cases.batch(12)["x"].movedim(1, -1).flatten(0, -2)
    assert_close(found[0][0], x.mean(0))
    assert_close(found[0][1], x.var(0))


def test_ranks_may_call_layers_in_different_orders(two: Crew) -> None:
    found = two.run(cases.in_another_order)
    assert_identical(found)
    assert found[0][0].abs().max() < 1
    assert (found[0][1] - 100).abs().max() < 1


def test_layers_without_a_gradient_move_with_the_next_forward(two: Crew) -> None:
    found = two.run(cases.frozen_backbone)
    assert_identical(found)
    assert found[0][2] == 5


def test_a_constant_channel_has_no_negative_variance(two: Crew) -> None:
    for found in two.run(cases.constant_channel):
        assert all(tensor.isfinite().all() for tensor in found)
        assert all(var >= 0 for var in found[::2])


@pytest.mark.parametrize(("how", "expected"), [("plain", 1), ("checkpoint", 1), ("failed block", 0)])
def test_a_worker_that_is_left_out_counts_once(two: Crew, how: str, expected: int) -> None:
    assert two.run(cases.left_out, how) == [[expected], [expected]]


def test_all_ranks_count_what_a_group_left_out(four: Crew) -> None:
    assert four.run(cases.left_out, "groups") == [[1]] * 4


def test_a_file_keeps_no_process_group_and_says_so(four: Crew) -> None:
    errors = four.run(cases.loaded_without_its_group)
    assert all("call renorm.synchronize(model, ...) again" in error for error in errors)


def test_an_integer_eps_is_a_number_like_any(two: Crew) -> None:
    assert_identical(two.run(cases.with_integer_eps))


def test_a_copy_of_a_layer_leaves_the_others_behind() -> None:
    model = renorm.synchronize(torch.nn.Sequential(*(renorm.BatchNorm1d(1_000) for _ in range(20))), "running")
    twin = copy.deepcopy(model[0])
    assert twin.pool is not model[0].pool
    assert len(pickle.dumps(model[0])) < 2 * len(pickle.dumps(renorm.BatchNorm1d(1_000)))
    whole = pickle.loads(pickle.dumps(model))
    assert all(layer.pool is whole[0].pool for layer in whole)


def test_a_copy_has_collectives_of_its_own(two: Crew) -> None:
    found = two.run(cases.copied)
    for model in range(2):
        assert_identical([rank[model] for rank in found])
    assert_close(found[0][0], found[0][1])


def test_layers_constructed_with_sync_need_no_call(two: Crew) -> None:
    found = two.run(cases.layers_by_hand)
    assert_identical(found)
    assert found[0][2] == 2


@pytest.mark.parametrize("sync", ["running", "batch"])
def test_a_worker_that_does_not_come_is_an_error_within_the_time_limit(sync: str) -> None:
    crew = Crew(2, limit=3)
    try:
        error, seconds = crew.run(cases.missing, sync)[0]
    finally:
        crew.stop()
    assert "timed out" in error.lower() or "timeout" in error.lower()
    assert seconds < 7


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_synchronized_is_refused() -> None:
    with pytest.raises(ValueError, match="sync must be None, 'running' or 'batch', got 'all'"):
        renorm.synchronize(renorm.BatchNorm1d(3), "all")
    with pytest.raises(ValueError, match="ranks_per_group is for sync='batch', got sync='running'"):
        renorm.synchronize(renorm.BatchNorm1d(3), "running", ranks_per_group=2)
    with pytest.raises(ValueError, match=r"examples_per_group cuts it into groups.*got examples_per_group=2"):
        renorm.GhostBatchNorm1d(3, 2, sync="batch")
    model = torch.nn.Sequential(renorm.BatchRenorm1d(3), renorm.BatchRenorm1d(3, examples_per_group=2))
    with pytest.raises(ValueError, match=r"cannot synchronize '1': sync='batch' takes one batch"):
        renorm.synchronize(model, "batch")
    assert model[0].sync is None
    with pytest.raises(ValueError, match=r"need renorm\.synchronize"):
        renorm.joinables(renorm.BatchNorm1d(3, sync="running"))
    with pytest.raises(ValueError, match="track_running_stats must be True"):
        renorm.BatchNorm1d(3, track_running_stats=False, sync="running")


@pytest.mark.parametrize("sync", ["running", "batch"])
def test_one_process_is_as_without_synchronization(sync: str) -> None:
    layer, plain = renorm.BatchRenorm1d(3, sync=sync), renorm.BatchRenorm1d(3)
    x = torch.randn(8, 3)
    assert torch.equal(layer(x), plain(x))
    assert_identical([cases.buffers(layer), cases.buffers(plain)])


def test_torch_s_converter_is_told_of_ours() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), renorm.BatchRenorm2d(3))
    with pytest.raises(RuntimeError, match=r'renorm\.synchronize\(model, "batch"\)'):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
