"""Ranks that train together give the result of one process, or refuse to."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from renorm_lab.errors import LabError
from renorm_lab.jobs import job
from renorm_lab.recipes.microbatch import Microbatch
from renorm_lab.recipes.range import Range
from renorm_lab.recipes.workers import Workers
from renorm_lab.training.ranks import Share, make_fabric, share_of

from .test_parts import run


@pytest.mark.parametrize(
    ("number", "changes", "share"),
    [
        (1, {"examples_per_group": 5}, Share(32, 32, 5)),
        (2, {}, Share(16, 16, None, "batch")),
        (2, {"examples_per_group": 32}, Share(16, 16, None, "batch")),
        (2, {"examples_per_group": 16}, Share(16, 16, 16, "running")),
        (2, {"examples_per_group": 2}, Share(16, 16, 2, "running")),
        (4, {"examples_per_group": 16}, Share(8, 8, None, "batch", 2)),
        (4, {"forward_size": 16}, Share(8, 8, None, "batch", 2)),
        (2, {"forward_size": 16}, Share(16, 16, None, "running")),
        (2, {"forward_size": 4}, Share(16, 4, None, "running")),
        (2, {"forward_size": 8, "examples_per_group": 3}, Share(16, 8, 3, "running")),
    ],
)
def test_share_of_a_minibatch(number: int, changes: dict, share: Share):
    assert share_of(run(**changes), number) == share


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (3, {}, "3 ranks cannot share a minibatch of 32 examples evenly"),
        (2, {"examples_per_group": 12}, "16 examples each cannot normalize over 12 examples as one process"),
        (4, {"forward_size": 12}, "8 examples each cannot normalize over 12"),
        (2, {"objective": "metric"}, "metric learning compares all examples of a minibatch"),
    ],
)
def test_what_ranks_cannot_share_is_refused(number: int, changes: dict, message: str):
    with pytest.raises(LabError, match=message):
        share_of(run(**changes), number)


def test_without_torchrun_there_is_one_rank():
    fabric = make_fabric("cpu")
    assert (fabric.world_size, fabric.global_rank, fabric.broadcast("mine")) == (1, 0, "mine")
    assert fabric.device == make_fabric("cpu:0").device == torch.device("cpu")


def torchrun(number: int, recipe: Microbatch | Range, stderr: int | None = None) -> subprocess.Popen[bytes]:
    options = [
        f"--data={recipe.data}", f"--batch-size={recipe.batch_size}", f"--steps={recipe.steps}", "--seeds=1",
        f"--group-sizes={list(recipe.group_sizes)}", f"--methods={list(recipe.methods)}", "--augment=true",
        f"--checkpoint-every={recipe.checkpoint_every}", f"--precision={recipe.precision}",
        "--save-weights=true", "--logger=none", f"--out={recipe.folder}", f"--device={recipe.device}",
    ]  # fmt: skip
    if isinstance(recipe, Microbatch):
        options.append(f"--forward-size={recipe.forward_size or 'null'}")
    return start(number, recipe.name, options, stderr)


def start(number: int, name: str, options: list[str], stderr: int | None = None) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    return subprocess.Popen([*launcher, "-m", "renorm_lab", "run", name, *options], stderr=stderr)


def losses(folder: Path) -> list[float]:
    with (folder / "curves.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: torch.load(path) for path in sorted((folder / "weights").iterdir())}


@pytest.fixture
def together(npz: Path, tmp_path: Path) -> Microbatch:
    """Statistics over all ranks, over some and over a part of one's examples.

    In float64: where an activation lies as near to 0 as a rounding error, that error decides whether ReLU passes its
    gradient, and two trainings in float32 part within a few steps, as two of one process would.
    """
    return Microbatch(
        data=str(npz), methods=("batch_norm", "batch_group_renorm"), seeds=1, steps=8, batch_size=16, augment=True,
        group_sizes=(16, 8, 4, 2), workers=1, save_weights=True, logger="none", checkpoint_every=5,
        precision="64-true", out=tmp_path / "together",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("number", "forward_size"), [(2, None), (4, None), (2, 4)])
def test_ranks_give_the_result_of_one_process(
    together: Microbatch, tmp_path: Path, number: int, forward_size: int | None
):
    if forward_size:
        together = replace(together, forward_size=forward_size, group_sizes=(4, 2))
    alone = replace(together, out=tmp_path / "alone")
    job.carry_out(alone, "")
    assert torchrun(number, together).wait(300) == 0
    expected = weights(alone.folder)
    assert len(expected) == 2 * len(together.group_sizes)
    torch.testing.assert_close(weights(together.folder), expected, rtol=1e-9, atol=1e-10)
    assert losses(together.folder) == pytest.approx(losses(alone.folder), rel=1e-6)  # of float32 logits


@pytest.mark.slow
def test_ranks_with_classes_of_their_own_give_the_result_of_one_process(tmp_path: Path):
    """Every rank holds half of the classes: their statistics are its own, those of the other column are all ranks'."""
    alone = Workers(
        methods=("batch_norm", "batch_renorm", "batch_renorm_unlimited", "group_norm"), classes_per_worker=(5,),
        frozen_shares=(0.5,), seeds=1, steps=12, workers=1, save_weights=True, logger="none", precision="64-true",
        out=tmp_path / "alone",
    )  # fmt: skip
    job.carry_out(alone, "")
    options = [
        "--methods", str(list(alone.methods)), "--classes-per-worker=[5]", "--frozen-shares=[0.5]", "--seeds=1",
        "--steps=12", "--save-weights=true", "--logger=none", "--precision=64-true", f"--out={tmp_path / 'together'}",
    ]  # fmt: skip
    assert start(2, alone.name, options).wait(300) == 0
    expected = weights(alone.folder)
    assert len(expected) == 5 * 2
    torch.testing.assert_close(weights(tmp_path / "together"), expected, rtol=1e-9, atol=1e-10)
    assert measures(tmp_path / "together") == pytest.approx(measures(alone.folder), rel=1e-6)


@pytest.mark.slow
def test_terminated_ranks_go_on_to_the_same_end(together: Microbatch, tmp_path: Path):
    whole = replace(together, methods=("batch_renorm",), group_sizes=(16,), steps=300, checkpoint_every=20)
    assert torchrun(2, whole).wait(300) == 0
    stopped = replace(whole, out=tmp_path / "stopped")
    process = torchrun(2, stopped)
    while not list(stopped.folder.glob("checkpoints/*/step-*.pt")) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) != 0
    assert not (stopped.folder / "results.csv").exists()
    assert torchrun(2, stopped).wait(300) == 0
    assert losses(stopped.folder) == losses(whole.folder)
    torch.testing.assert_close(weights(stopped.folder), weights(whole.folder), rtol=0, atol=0)


@pytest.mark.slow
def test_what_ranks_measure_is_that_of_one_process(npz: Path, tmp_path: Path):
    together = Range(
        data=str(npz), seeds=1, steps=8, batch_size=16, augment=True, group_sizes=(8,), workers=1, save_weights=True,
        logger="none", precision="64-true", out=tmp_path / "together",
    )  # fmt: skip
    alone = replace(together, out=tmp_path / "alone")
    job.carry_out(alone, "")
    assert torchrun(4, together).wait(300) == 0  # groups of two ranks
    assert measures(together.folder) == pytest.approx(measures(alone.folder), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": "nowhere"}, "renorm: error: nowhere: there is no such file"),
        ({"steps": 9}, "holds results with steps = 8, not 9"),
        ({"device": "nothing"}, "renorm: error: device nothing cannot be used"),
    ],
)
def test_an_error_of_ranks_is_a_line_of_each(together: Microbatch, wrong: dict, message: str):
    together = replace(together, methods=("batch_norm",), group_sizes=(16,))
    job.carry_out(together, "")
    process = torchrun(2, replace(together, **wrong), subprocess.PIPE)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode != 0
    assert message in said
    assert "[rank" not in said  # as torch marks tracebacks


def measures(folder: Path) -> dict[str, float]:
    with (folder / "measures.csv").open() as file:
        return {row["measure"]: float(row["value"]) for row in csv.DictReader(file)}
