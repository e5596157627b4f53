"""The training loop: minibatches in parts, precision, compilation, and what it logs."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import renorm
from renorm_lab.errors import LabError
from renorm_lab.jobs import job
from renorm_lab.networks.models import mlp
from renorm_lab.recipes.noniid import NonIid
from renorm_lab.runs import Precision
from renorm_lab.training import loggers, train
from renorm_lab.training.ranks import make_fabric
from renorm_lab.training.train import backward

from .conftest import arrays
from .test_job import rows


@pytest.fixture(autouse=True)
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than these runs."""
    monkeypatch.setattr(job, "_report", lambda *_: None)


@pytest.fixture
def short(npz: Path, tmp_path: Path) -> NonIid:
    """Two runs of a few steps."""
    return NonIid(
        data=str(npz), model="mlp", methods=("batch_renorm",), seeds=1, steps=20, workers=1, logger="none",
        out=tmp_path / "out",
    )  # fmt: skip


@pytest.mark.parametrize("forward_size", [4, 8, 12])
def test_a_minibatch_in_several_forwards_is_as_in_one(forward_size: int):
    """Statistics over 4 examples, one gradient of 24 and one update, as with the paper's workers."""

    def norm(channels: int) -> renorm.Norm:
        return renorm.Norm(channels, limits=renorm.Limits.constant(), examples_per_group=4, tracking="std")

    fabric = make_fabric("cpu")
    networks = [mlp(64, 3, norm) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    images, labels = torch.randn(24, 1, 8, 8), torch.arange(24) % 3
    losses = [
        backward(fabric, fabric.setup(network), F.cross_entropy, images, labels, size)
        for network, size in zip(networks, (24, forward_size), strict=True)
    ]
    torch.testing.assert_close(*losses)
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    for one, other in zip(*(network.buffers() for network in networks), strict=True):
        torch.testing.assert_close(one, other)


def test_same_command_gives_the_same_results(short: NonIid, tmp_path: Path):
    again = replace(short, out=tmp_path / "again")
    job.carry_out(short, "")
    job.carry_out(again, "")
    assert rows(short.folder) == rows(again.folder)
    assert (short.folder / "curves.csv").read_text() == (again.folder / "curves.csv").read_text()


@pytest.mark.parametrize("model", ["resnet8", "plain8"])
def test_what_makes_larger_images_faster_changes_no_result_but_by_rounding(
    model: str, short: NonIid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    np.savez(tmp_path / "large.npz", **arrays(size=32))
    fast = replace(
        short, data=str(tmp_path / "large.npz"), model=model, steps=3, precision="64-true", save_weights=True
    )
    slow = replace(fast, out=tmp_path / "slow")
    job.carry_out(fast, "")
    monkeypatch.setattr(train, "_LARGE", 33)
    job.carry_out(slow, "")
    assert rows(fast.folder)
    for file in sorted((slow.folder / "weights").iterdir()):
        there, here = (torch.load(folder / "weights" / file.name) for folder in (slow.folder, fast.folder))
        assert list(there) == list(here)
        for name, value in there.items():
            torch.testing.assert_close(here[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_learn_too(short: NonIid, precision: Precision):
    job.carry_out(replace(short, precision=precision, methods=("batch_norm",)), "")
    table = rows(short.folder)
    assert [row["precision"] for row in table] == [precision] * 2
    assert float(table[0]["test_accuracy_off"]) > 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler's own import
def test_compiled_training_gives_the_same_results(short: NonIid, tmp_path: Path, fresh_compiler: None):
    compiled = replace(short, compile=True, out=tmp_path / "compiled")
    job.carry_out(short, "")
    job.carry_out(compiled, "")
    for eager, other in zip(rows(short.folder), rows(compiled.folder), strict=True):
        assert float(other["test_loss_off"]) == pytest.approx(float(eager["test_loss_off"]), rel=1e-3)


def test_tensorboard_has_loss_learning_rate_accuracy_and_the_layers_r_and_d(short: NonIid):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job.carry_out(replace(short, logger="tensorboard"), "")
    folders = list((short.folder / "logs").iterdir())
    assert len(folders) == 2
    events = EventAccumulator(str(folders[0])).Reload()
    quantities = ("r_low", "r_median", "r_high", "d_low", "d_median", "d_high", "clipped_r", "clipped_d", "gap")
    of_layers = {f"{quantity}/{layer}" for quantity in quantities for layer in (2, 5, 8, 11)}
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/learning_rate", "validation/accuracy"} | of_layers
    assert [event.step for event in events.Scalars("r_high/2")] == list(range(1, 21))
    assert all(event.value > 0 for event in events.Scalars("r_high/2"))
    assert [event.step for event in events.Scalars("validation/accuracy")] == list(range(1, 21))
    assert events.Scalars("train/learning_rate")[-1].value == pytest.approx(0)


def test_csv_logger_writes_the_same_numbers(short: NonIid):
    job.carry_out(replace(short, logger="csv"), "")
    with next((short.folder / "logs").glob("i.i.d.*/from-step-0/metrics.csv")).open() as file:
        logged = [row["validation/accuracy"] for row in csv.DictReader(file) if row["validation/accuracy"]]
    with (short.folder / "curves.csv").open() as file:
        assert logged == [row["validation_accuracy"] for row in csv.DictReader(file) if row["regime"] == "i.i.d."]


def test_missing_package_of_a_logger_is_named_before_training(short: NonIid, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(LabError, match="logger wandb needs the package wandb, which is not installed"):
        job.carry_out(replace(short, logger="wandb"), "")
    assert not short.folder.exists()


def test_without_tensorboard_it_is_said_once(
    short: NonIid, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    job.carry_out(replace(short, logger="tensorboard"), "")
    assert capsys.readouterr().err.count("TensorBoard is not installed") == 1
    assert not (short.folder / "logs").exists()
    assert (short.folder / "curves.csv").exists()


def test_each_training_has_a_run_of_its_own_in_wandb(short: NonIid, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    logger = SimpleNamespace(
        log_metrics=lambda numbers, step: None, finalize=lambda status: calls.append(f"finalized as {status}")
    )
    wandb = SimpleNamespace(finish=lambda exit_code: calls.append(f"finished with {exit_code}"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(loggers, "_missing_package", lambda name: None)
    monkeypatch.setattr(loggers, "_make_logger", lambda recipe, run, step: logger)
    job.carry_out(replace(short, logger="wandb"), "")
    assert calls == ["finalized as success", "finished with 0"] * 2


def test_frozen_layers_normalize_by_their_running_statistics_which_stay():
    fabric, images, labels = make_fabric("cpu"), torch.randn(24, 1, 8, 8), torch.arange(24) % 3
    network = mlp(64, 3, partial(renorm.Norm, examples_per_group=4))
    before = [buffer.clone() for buffer in network.buffers()]
    loss = backward(fabric, fabric.setup(network), F.cross_entropy, images, labels, 24, frozen=True)
    assert all(map(torch.equal, before, network.buffers()))
    torch.testing.assert_close(loss, F.cross_entropy(network.eval()(images), labels))
