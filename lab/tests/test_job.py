"""A recipe from beginning to end: what it writes, and that it continues after an interruption."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from renorm_lab.cli import main
from renorm_lab.errors import LabError
from renorm_lab.jobs import execution, job
from renorm_lab.jobs.interrupts import hearing_interrupts
from renorm_lab.recipes.microbatch import Microbatch
from renorm_lab.recipes.noniid import NonIid
from renorm_lab.recipes.workers import Workers
from renorm_lab.runs import Result, Run
from renorm_lab.store import sole_writer
from renorm_lab.training.train import train

from .conftest import arrays

FILES = {
    "results.csv", "curves.csv", "measures.csv", "table.md", "bars.png", "curves.png", "command.txt", "config.yaml",
    "provenance.json", "logs",
}  # fmt: skip


def rows(folder: Path, ignore: tuple[str, ...] = ("seconds",)) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in ignore} for row in csv.DictReader(file)]


def test_folder_holds_everything(noniid: NonIid):
    job.carry_out(noniid, "renorm run noniid")
    assert {path.name for path in noniid.folder.iterdir()} == FILES
    assert (noniid.folder / "command.txt").read_text() == "renorm run noniid\n"
    assert (noniid.folder / "bars.png").read_bytes().startswith(b"\x89PNG")
    table = rows(noniid.folder)
    assert [(row["method"], row["regime"]) for row in table] == [
        ("batch norm", "i.i.d."), ("batch norm", "2 classes x 16"),
        ("batch renorm", "i.i.d."), ("batch renorm", "2 classes x 16"),
    ]  # fmt: skip
    assert all(row["torch"] and row["renorm"] and row["python"] for row in table)
    assert float(table[0]["test_accuracy_off"]) > 0.5  # it learned


@pytest.mark.slow
def test_workers_and_this_process_give_the_same_results(noniid: NonIid, tmp_path: Path):
    job.carry_out(noniid, "")
    side_by_side = replace(noniid, workers=2, out=tmp_path / "workers")
    job.carry_out(side_by_side, "")
    assert rows(side_by_side.folder) == rows(noniid.folder)
    assert (side_by_side.folder / "curves.csv").read_text() == (noniid.folder / "curves.csv").read_text()


def test_interrupted_job_continues_with_the_missing_runs(noniid: NonIid, tmp_path: Path, monkeypatch):
    trained: list[str] = []

    def train_two(run, dataset, recipe, progress):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(str(run))
        return train(run, dataset, recipe, progress)

    monkeypatch.setattr("renorm_lab.jobs.execution.train", train_two)
    with pytest.raises(KeyboardInterrupt):
        job.carry_out(noniid, "")
    assert len(rows(noniid.folder)) == 2
    trained.clear()
    job.carry_out(noniid, "")
    assert trained == ["batch renorm, i.i.d., seed 0", "batch renorm, 2 classes x 16, seed 0"]
    monkeypatch.undo()
    whole = replace(noniid, out=tmp_path / "whole")
    job.carry_out(whole, "")
    assert rows(noniid.folder) == rows(whole.folder)


def test_finished_job_only_reports(noniid: NonIid, monkeypatch):
    job.carry_out(noniid, "")
    before = (noniid.folder / "results.csv").read_text()
    monkeypatch.setattr("renorm_lab.jobs.execution.train", None)
    job.carry_out(noniid, "")
    assert (noniid.folder / "results.csv").read_text() == before


def test_folder_of_an_older_version_goes_on_or_is_refused(noniid: NonIid):
    job.carry_out(noniid, "")
    options = yaml.safe_load((noniid.folder / "config.yaml").read_text())
    for name in ("config.yaml", "provenance.json"):
        (noniid.folder / name).unlink()
    old = {"recipe": "noniid"} | {name: options[name] for name in ("data", "steps", "seeds", "methods", "lr")}
    (noniid.folder / "settings.json").write_text(json.dumps(old))
    job.carry_out(noniid, "")
    (noniid.folder / "settings.json").write_text(json.dumps(old | {"steps": 19}))
    with pytest.raises(LabError, match=r"holds results with steps = 19, not 20"):
        job.carry_out(noniid, "")


def test_folder_from_before_an_option_goes_on_with_its_default(tmp_path: Path):
    recipe = Workers(methods=("group_norm",), classes_per_worker=(), frozen_shares=(), seeds=1, steps=2, workers=1,
                     logger="none", out=tmp_path / "out")  # fmt: skip
    job.carry_out(recipe, "")
    path = recipe.folder / "config.yaml"
    options = yaml.safe_load(path.read_text())
    assert options.pop("rates") == {}
    path.write_text(yaml.safe_dump(options))
    job.carry_out(recipe, "")
    with pytest.raises(LabError, match=r"holds results with rates = \{\}, not \{'group norm': 0.5\}"):
        job.carry_out(replace(recipe, rates={"group norm": 0.5}), "")


def test_folder_says_where_it_comes_from(noniid: NonIid):
    job.carry_out(noniid, "renorm run noniid --steps 20")
    origin = json.loads((noniid.folder / "provenance.json").read_text())
    assert origin["recipe"] == "noniid"
    assert origin["command"] == "renorm run noniid --steps 20"
    assert origin["seeds"] == [0]
    assert origin["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_continuation_keeps_what_the_finished_runs_were_trained_with(noniid: NonIid, monkeypatch):
    fewer = replace(noniid, methods=("batch_norm",))
    job.carry_out(fewer, "first")
    files = [noniid.folder / name for name in ("provenance.json", "command.txt", "config.yaml", "results.csv")]
    before = [path.read_text() for path in files]
    monkeypatch.setattr("renorm_lab.training.train.program_versions", lambda: (("torch", "9.9"),))
    job.carry_out(fewer, "nothing is missing")
    assert [path.read_text() for path in files] == before
    drop_last_row(noniid.folder / "results.csv")
    job.carry_out(fewer, "second")
    origin = json.loads((noniid.folder / "provenance.json").read_text())
    assert (noniid.folder / "command.txt").read_text() == "first\n"
    assert origin["command"] == "first"
    assert [entry["command"] for entry in origin["continued"]] == ["second"]
    assert origin["continued"][0].keys() == {"command", "versions", "git"}
    assert [row["torch"] for row in rows(noniid.folder)] == [torch.__version__, "9.9"]


def drop_last_row(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def test_config_is_read_back(noniid: NonIid, monkeypatch):
    job.carry_out(noniid, "")
    monkeypatch.setattr("renorm_lab.jobs.execution.train", None)
    assert main(["run", "noniid", "--config", str(noniid.folder / "config.yaml")]) == 0


def test_folder_of_another_recipe_is_refused(noniid: NonIid):
    job.carry_out(noniid, "")
    with pytest.raises(LabError, match=r"holds results with recipe = noniid, not microbatch"):
        job.carry_out(Microbatch(seeds=1, steps=20, out=noniid.folder), "")


def test_folder_of_other_settings_is_refused(noniid: NonIid):
    job.carry_out(noniid, "")
    with pytest.raises(LabError, match=r"holds results with steps = 20, not 21"):
        job.carry_out(replace(noniid, steps=21), "")


def test_damaged_results_are_named(noniid: NonIid):
    job.carry_out(noniid, "")
    path = noniid.folder / "results.csv"
    path.write_text(path.read_text().replace("batch norm", "batch nor"))
    with pytest.raises(LabError, match=r"results\.csv: damaged"):
        job.carry_out(noniid, "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("curves.csv", "regime,method,seed,step\ni.i.d.,batch norm,0,one\n", "damaged, or of another version"),
        ("measures.csv", "regime,method,seed,measure,value\na,b,0,c,much\n", "damaged, or of another version"),
        ("results.csv", 'recipe,"', "cannot be read"),
        ("config.yaml", "", "damaged: it must hold options by name"),
        ("config.yaml", "a: [1", "damaged: "),
        ("provenance.json", "[1]", "damaged: it must hold options by name"),
        ("provenance.json", '{"command": ""}', "damaged: it does not name the recipe"),
    ],
)
def test_damaged_file_is_named(finished: NonIid, name: str, content: str, message: str):
    path = finished.folder / name
    before = path.read_text()
    path.write_text(content)
    with pytest.raises(LabError, match=f"{name}: {message}") as raised:
        job.carry_out(finished, "")
    path.write_text(before)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> NonIid:
    """A finished job."""
    recipe = NonIid(methods=("batch_norm",), seeds=1, steps=20, workers=1, out=tmp_path_factory.mktemp("finished"))
    job.carry_out(recipe, "")
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_process_leaves_finished_runs_and_no_worker(tmp_path: Path, number: signal.Signals):
    out = tmp_path / "out"
    arguments = ["run", "noniid", "--seeds=3", "--steps=300", "--methods=[batch_norm]", f"--out={out}"]
    command = [sys.executable, "-m", "renorm_lab", *arguments, "--workers=2"]
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=hear_interrupts)
    deadline = time.monotonic() + 120
    while not (out / "results.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == (-number if number == signal.SIGKILL else 130)
    assert 1 <= len(rows(out)) < 6
    while group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_lives(process.pid)
    assert main([*arguments, "--workers=1"]) == 0
    assert len(rows(out)) == 6


def hear_interrupts() -> None:
    """What is started in the background of a script ignores them, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


ALL_RUN = threading.Barrier(3, timeout=60)  # what has not started when a run fails is cancelled


def fail_first(run: Run, index: int) -> Result:
    """The first run fails at once; the second is finished in the same moment, the third while workers are stopped."""
    ALL_RUN.wait()
    if index == 0:
        raise RuntimeError("it failed")
    time.sleep(0.5 * (index - 1))
    return Result(0.0, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 0.1, ())


def test_results_beside_a_failure_are_kept(noniid: NonIid, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(execution, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(execution, "train_in_worker", fail_first)
    kept: list[Run] = []
    runs = noniid.runs(noniid.load())[:3]
    with pytest.raises(LabError, match=f"{runs[0]}: it failed"):
        execution.run_in_processes(runs, noniid, 3, lambda run, result: kept.append(run), lambda steps: None)
    assert kept == runs[1:]


@pytest.mark.slow
def test_worker_that_dies_is_an_error_that_names_the_run(noniid: NonIid, monkeypatch):
    monkeypatch.setattr("renorm_lab.jobs.execution.train_in_worker", die)
    with pytest.raises(LabError, match=r"a worker process died .* its start"):
        job.carry_out(replace(noniid, workers=2), "")


def die(run, index):
    os._exit(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes_per_batch": 11}, "classes_per_batch must be at most 10"),
        ({"examples_per_class": 200}, "examples_per_class=200"),
        ({"methods": ()}, "at least one element"),
        ({"methods": ("batch_norm", "batch_norm")}, "nothing twice, got twice: batch norm, i.i.d., seed 0"),
        ({"device": "nothing"}, "device nothing cannot be used"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(noniid: NonIid, options: dict, message: str):
    with pytest.raises(LabError, match=message):
        job.carry_out(replace(noniid, **options), "")
    assert not noniid.folder.exists()


def test_microbatch_groups_every_method(microbatch: Microbatch):
    job.carry_out(microbatch, "")
    table = rows(microbatch.folder)
    assert [(row["regime"], row["examples_per_group"], row["channels_per_group"]) for row in table] == [
        ("n = 8", "8", "8"), ("n = 2", "2", "8"),
    ]  # fmt: skip
    assert all(row["batch_size"] == "32" and row["limits"] == "True" for row in table)


def test_colour_images_train_a_residual_network_with_augmentation(tmp_path: Path):
    np.savez(tmp_path / "colour.npz", **arrays(size=32, channels=3))
    recipe = Microbatch(data=str(tmp_path / "colour.npz"), methods=("batch_group_norm",), group_sizes=(4,), seeds=1,
                        steps=2, batch_size=8, workers=1, out=tmp_path / "out")  # fmt: skip
    job.carry_out(recipe, "")
    (row,) = rows(recipe.folder)
    assert (row["model"], row["augment"]) == ("resnet8", "True")


class Dying:
    """Sends a signal where an exception would be lost."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def interrupted(numbers: list[int], reached: list[int]) -> None:
    """A block in which signals come, each in a destructor."""
    with hearing_interrupts() as stop_if_heard:
        for number in numbers:
            Dying(number)
            reached.append(number)
        stop_if_heard()
        reached.append(0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_interrupt_is_lost_in_a_destructor(number: int):
    reached: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted([number], reached)
    assert reached == [number]


def test_a_second_interrupt_does_not_wait():
    reached: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_twice(reached)
    assert reached == [1]


def interrupt_twice(reached: list[int]) -> None:
    with hearing_interrupts():
        for number in (1, 2):
            signal.raise_signal(signal.SIGINT)
            reached.append(number)


def test_an_interrupt_at_the_last_moment_is_heard():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), hearing_interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_folder_is_one_process_s_alone(tmp_path: Path):
    with sole_writer(tmp_path / "out"):
        with pytest.raises(LabError, match="out: another process is writing to it"), sole_writer(tmp_path / "out", 0):
            pass
        with sole_writer(tmp_path / "other"):
            pass
    with sole_writer(tmp_path / "out", 0):
        pass


def test_workers_that_are_stopped_with_their_parent_are_no_crash(noniid: NonIid, monkeypatch: pytest.MonkeyPatch):
    class Broken(ThreadPoolExecutor):
        def submit(self, *_: object) -> Future:
            future: Future = Future()
            future.set_exception(BrokenProcessPool())
            return future

    def show(steps: object) -> None:
        if any(shown):
            raise KeyboardInterrupt  # as it is once the signal has come, which may be a moment later
        shown.append(True)

    shown: list[bool] = []
    monkeypatch.setattr(execution, "ProcessPoolExecutor", lambda workers, *_: Broken(workers))
    with pytest.raises(KeyboardInterrupt):
        execution.run_in_processes(noniid.runs(noniid.load()), noniid, 2, lambda run, result: None, show)
