"""Runs that are stopped anywhere, and go on: the end is that of a run that was never stopped, to the last bit."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt

from renorm_lab.errors import LabError
from renorm_lab.jobs import job
from renorm_lab.recipes.finetune import Finetune
from renorm_lab.recipes.noniid import NonIid
from renorm_lab.training import checkpoints
from renorm_lab.training import train as training
from renorm_lab.training.checkpoints import Checkpoints
from renorm_lab.training.evaluation import ALPHAS

from .conftest import arrays
from .test_job import rows

EVERY, STEPS = 10, 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in colour, which are augmented."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, **arrays(channels=3))
    return path


def make_recipe(data: Path, out: Path) -> NonIid:
    """Two short runs, as from the command line, with everything that has a state: augmentation, limits, averages."""
    return NonIid(
        data=str(data), model="mlp", methods=("batch_renorm",), seeds=1, steps=PositiveInt(STEPS),
        lr=PositiveFloat(0.05), workers=1, augment=True,
        checkpoint_every=EVERY, average=0.9, save_weights=True, logger="none", out=out,
    )  # fmt: skip


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> NonIid:
    """What is stopped."""
    return make_recipe(data, tmp_path / "interrupted")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same runs, never stopped."""
    uninterrupted = make_recipe(data, tmp_path_factory.mktemp("whole"))
    job.carry_out(uninterrupted, "")
    return uninterrupted.folder


@pytest.fixture(autouse=True)
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than these runs."""
    monkeypatch.setattr(job, "_report", lambda *_: None)


def assert_same(folder: Path, expected: Path) -> None:
    assert rows(folder) == rows(expected)
    assert (folder / "curves.csv").read_text() == (expected / "curves.csv").read_text()
    weights = {path.name: torch.load(path) for path in (expected / "weights").iterdir()}
    assert {path.name for path in (folder / "weights").iterdir()} == weights.keys()
    for name, state in weights.items():
        other = torch.load(folder / "weights" / name)
        assert all(torch.equal(value, other[key]) for key, value in state.items())
    assert not (folder / "checkpoints").exists()


def at_call(number: int, function: Callable[..., Any], act: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but for one call."""
    calls = iter(range(1, 1_000_000))

    def called(*arguments: Any, **named: Any) -> Any:
        return (act if next(calls) == number else function)(*arguments, **named)

    return called


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_half_and_die(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    die()


def rename_and_die(source: Path, target: Path) -> None:
    os.rename(source, target)
    die()


POINTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "in a step": lambda patch: patch.setattr(training, "backward", at_call(33, training.backward, die)),
    "in the second run": lambda patch: patch.setattr(training, "backward", at_call(STEPS + 5, training.backward, die)),
    "half a checkpoint written": lambda patch: patch.setattr(
        Path, "write_bytes", at_call(3, Path.write_bytes, write_half_and_die)
    ),
    "a checkpoint not yet renamed": lambda patch: patch.setattr(os, "fsync", at_call(6, os.fsync, die)),
    "a checkpoint just renamed": lambda patch: patch.setattr(os, "replace", at_call(6, os.replace, rename_and_die)),
    "before old checkpoints are removed": lambda patch: patch.setattr(Path, "unlink", die),
    "between the end of a run and its result": lambda patch: patch.setattr(job, "write_results", die),
    "between result and removal": lambda patch: patch.setattr(Checkpoints, "remove", die),
}


def carry_out_until(recipe: NonIid, point: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        POINTS[point](patch)
        job.carry_out(recipe, "")


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_run_goes_on_to_the_same_end(recipe: NonIid, whole: Path, point: str):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.fabric", training.__name__])
    process = context.Process(target=carry_out_until, args=(recipe, point))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    job.carry_out(recipe, "")
    assert_same(recipe.folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "folders", "kills"), [(1, 2, 4), (2, 1, 1)])
def test_runs_killed_at_random_instants_end_as_if_they_had_not_been(
    tmp_path: Path, workers: int, folders: int, kills: int
):
    options = [f"--folders={folders}", f"--kills={kills}", f"--workers={workers}", "--commands", "noniid", "microbatch"]
    script = Path(__file__).with_name("kills.py")
    ended = subprocess.run([sys.executable, str(script), str(tmp_path), *options], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def stop_at(step: int, error: BaseException) -> Callable[[pytest.MonkeyPatch], None]:
    def act(*_: Any, **__: Any) -> None:
        raise error

    return lambda patch: patch.setattr(training, "backward", at_call(step, training.backward, act))


def test_at_most_an_interval_is_trained_again(recipe: NonIid, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stop_at(39, KeyboardInterrupt())(patch)
        with pytest.raises(KeyboardInterrupt):
            job.carry_out(recipe, "")
    steps: list[int] = []
    monkeypatch.setattr(job.RunProgress, "show", lambda self, done: steps.append(done[0]))
    job.carry_out(recipe, "")
    assert steps[0] == 31


def interrupted(recipe: NonIid, step: int = 35) -> list[Path]:
    """Stop the first run, and give its checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(step, KeyboardInterrupt())(patch)
        with pytest.raises(KeyboardInterrupt):
            job.carry_out(recipe, "")
    return sorted((recipe.folder / "checkpoints").glob("*/step-*.pt"))


def test_last_two_checkpoints_are_kept(recipe: NonIid):
    assert [path.name[:14] for path in interrupted(recipe)] == ["step-000000020", "step-000000030"]


def test_checkpoint_is_read_without_running_code(recipe: NonIid):
    state = torch.load(interrupted(recipe)[-1], weights_only=True)
    assert state["step"] == 30


def turn_a_byte(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-100], turn_a_byte], ids=["empty", "cut off", "a bit turned"]
)
@pytest.mark.parametrize("damaged", [1, 2])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    recipe: NonIid, whole: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes], damaged: int
):
    for path in interrupted(recipe)[-damaged:]:
        path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    job.carry_out(recipe, "")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert len(warnings) == damaged
    assert "step-000000030" in warnings[0]
    assert_same(recipe.folder, whole)


@pytest.mark.parametrize("call", [3, 7], ids=["first run", "second run"])
def test_full_disk_is_an_error_of_one_line_and_the_same_command_goes_on(
    recipe: NonIid, whole: Path, monkeypatch: pytest.MonkeyPatch, call: int
):
    def full(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", at_call(call, Path.write_bytes, full))
        with pytest.raises(LabError, match=r"step-\d+.*\.pt: cannot be written: No space left on device") as error:
            job.carry_out(recipe, "")
    assert "\n" not in str(error.value)
    assert not list(recipe.folder.rglob("*.part"))
    job.carry_out(recipe, "")
    assert_same(recipe.folder, whole)


def test_full_disk_at_the_results_is_an_error_of_one_line(recipe: NonIid, whole: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        stop_at(1, KeyboardInterrupt())(patch)
        with pytest.raises(KeyboardInterrupt):
            job.carry_out(recipe, "")
    with monkeypatch.context() as patch:
        before = 1 + STEPS // EVERY + 1  # provenance.json, checkpoints and weights
        patch.setattr(os, "fsync", at_call(before + 1, os.fsync, full))
        with pytest.raises(LabError, match=r"\.csv: cannot be written: No space left on device"):
            job.carry_out(recipe, "")
    job.carry_out(recipe, "")
    assert_same(recipe.folder, whole)


def test_random_numbers_go_on_where_they_were():
    states = checkpoints.random_states(torch.device("cpu"))
    first = torch.rand(3)
    checkpoints.set_random_states(states, torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)


@pytest.fixture
def finetune(tmp_path: Path) -> Finetune:
    """A run that trains on other classes before."""
    return Finetune(
        methods=("batch_norm",), batch_sizes=(8,), seeds=1, steps=4, pretraining_steps=6, workers=1, logger="none",
        out=tmp_path / "tuned",
    )  # fmt: skip


def test_pretraining_stops_at_once_and_is_not_repeated_once_it_is_finished(finetune: Finetune):
    dataset = finetune.load()
    (run, *_) = finetune.runs(dataset)
    calls: list[int] = []

    def stop_after(number: int) -> Callable[[int], None]:
        def progress(step: int) -> None:
            calls.append(step)
            if len(calls) == number:
                raise KeyboardInterrupt

        return progress

    for number in (3, 7):  # in the pretraining, and in the first step after it
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            training.train(run, dataset, finetune, stop_after(number))
        assert calls == ([0] * 6 + [1])[:number]
    calls.clear()
    resumed = training.train(run, dataset, finetune, calls.append)
    assert calls == [1, 2, 3, 4, *[4] * len(ALPHAS)]  # and after each evaluation
    Checkpoints(finetune.folder, run).remove()
    whole = training.train(run, finetune.load(), finetune, calls.append)
    assert whole.curve == resumed.curve
