"""Files from outside end in one line, or are taken rightly: in a few seconds, in little memory, without a traceback."""

from __future__ import annotations

import csv
import random
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import renorm_lab.cli
from renorm_lab.cli import main
from renorm_lab.data import load_dataset
from renorm_lab.data.classes import load_unseen
from renorm_lab.errors import LabError
from renorm_lab.jobs import job
from renorm_lab.recipes.microbatch import Microbatch
from renorm_lab.recipes.noniid import NonIid
from renorm_lab.report import page
from renorm_lab.training import train as training
from renorm_lab.training.checkpoints import Checkpoints

from . import outside
from .conftest import arrays

_SECONDS, _BYTES = 30, 2**31  # of an input; most take milliseconds, and this machine may be busy
RUN = ["run", "microbatch", "--methods=[batch_norm]", "--group-sizes=[8]", "--seeds=1", "--steps=2", "--workers=1",
       "--model=mlp", "--logger=none"]  # fmt: skip


@contextmanager
def bounded() -> Iterator[None]:
    """A block with little time and memory."""

    def late(*_: object) -> None:
        raise TimeoutError("took too long")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def wrong(attempt: Callable[[], object]) -> str:
    """What is wrong with how a function ends; empty if it returns, or raises an error of one line."""
    try:
        with bounded():
            attempt()
    except LabError as error:
        text = str(error)
        return "" if text and "\n" not in text else f"more than a line: {text!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def said_wrongly(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The same of a command, which may exit with 0, or with 1 or 2 and its error on standard error."""
    status: object = None

    def attempt() -> None:
        nonlocal status
        try:
            status = main(arguments)
        except SystemExit as error:  # of options that are none
            status = error.code

    capsys.readouterr()
    problem = wrong(attempt)
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if "error: " in line]
    if problem or status == 0:
        return problem
    if status == 1 and said.count("\n") == 1 and said.startswith("renorm: error: "):
        return ""
    return "" if status == 2 and len(errors) == 1 and "Traceback" not in said else f"exit code {status}: {said[-500:]}"


@pytest.fixture(autouse=True)
def no_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_files_of_arrays(tmp_path: Path):
    path, problems, tried = tmp_path / "x.npz", {}, 0
    for name, data in outside.npz_files(random.Random(0)):
        path.write_bytes(data)
        for load in (load_dataset, load_unseen):
            tried += 1
            if problem := wrong(lambda load=load: load(str(path), tmp_path, 32)):
                problems[f"{name}, {load.__name__}"] = problem
    print(f"{tried} tried, {len(problems)} wrong")
    assert not problems, problems


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("size", [16, 96])  # in memory, and in their files
def test_folders_of_images(tmp_path: Path, size: int):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (20, 24), (index, 0, 0)).save(tmp_path / "data" / name / f"{index}.png")

    def attempt() -> None:
        dataset = load_dataset(str(tmp_path / "data"), tmp_path, size)
        dataset.train.take(range(len(dataset.train)))
        dataset.test.take(range(len(dataset.test)))

    path, problems, tried = tmp_path / "data" / "a" / "odd.png", {}, 0
    makers = [(name, lambda path, data=data: path.write_bytes(data)) for name, data in outside.images(random.Random(0))]
    makers += outside.folders(lambda path: Image.new("RGB", (20, 24)).save(path))
    for name, make in makers:
        make(path)
        tried += 1
        if problem := wrong(attempt):
            problems[name] = problem
        outside.remove(path)
    print(f"{tried} tried, {len(problems)} wrong")
    assert not problems, problems


def test_links_to_folders_above_are_not_followed_round_and_round(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(8):
            Image.new("RGB", (20, 24), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
        (tmp_path / name / "self").symlink_to(".")
        (tmp_path / name / "up").symlink_to("..")
    (tmp_path / "a" / "other").symlink_to("../b")
    with bounded():
        dataset = load_dataset(str(tmp_path), tmp_path, 16)
    parts = dataset.train, dataset.validation, dataset.test
    assert sum(map(len, parts)) == 2 * (8 + 8)  # each class has its own, and those of the folder that a link leads to


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main([*RUN, f"--out={out}", "--average=0.5"]) == 0
    return out


def not_trained(*_: object) -> None:
    raise LabError("this would be trained")


def settings_and_tables(finished: Path) -> Iterator[tuple[str, str, bytes]]:
    chance = random.Random(1)
    for file in ("config.yaml", "provenance.json"):
        for name, data in outside.configs(chance, (finished / file).read_text()):
            yield file, name, data
    measured = "regime,method,seed,measure,value\nn = 8,batch norm,0,gap,0.5\nn = 8,batch norm,0,other,nan\n"
    (finished / "measures.csv").write_text(measured)
    for file in ("results.csv", "curves.csv", "measures.csv"):
        for name, data in outside.cells(chance, (finished / file).read_text()):
            yield file, name, data
    for data in (b"\xff\xfe\0", b"\0", b"\x1b[31m", bytes(range(256)), b""):
        yield "command.txt", repr(data[:9]), data
    for continued in ("null", "1", '"text"', "[[]]", '{"a": 1}'):
        origin = (finished / "provenance.json").read_text().rstrip()[:-1] + f', "continued": {continued}}}'
        yield "provenance.json", f"continued {continued}", origin.encode()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_run_folders(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(job, "_report", lambda *_: None)
    monkeypatch.setattr(page, "pictures", lambda *_: [])  # some are drawn below
    monkeypatch.setattr("renorm_lab.jobs.execution.train", not_trained)
    recipe = Microbatch(methods=("batch_norm",), group_sizes=(8,), seeds=1, steps=2, workers=1, model="mlp",
                        average=0.5, logger="none", out=finished)  # fmt: skip
    problems, tried = {}, 0
    inputs = list(settings_and_tables(finished))
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    for file, name, data in inputs:
        (finished / file).write_bytes(data)
        for attempt in (lambda: page.report([finished], tmp_path), lambda: job.carry_out(recipe, "")):
            tried += 1
            if problem := wrong(attempt):
                problems[f"{file}, {name}, {tried % 2}"] = problem
        for path, content in before.items():
            path.write_bytes(content)
    job.carry_out(recipe, "")
    with capsys.disabled():
        print(f"{tried} tried, {len(problems)} wrong")
    assert not problems, problems


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_files_of_options(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(job, "_run_missing", not_trained)
    monkeypatch.chdir(tmp_path)
    path, problems, tried = tmp_path / "options.yaml", {}, 0
    monkeypatch.setattr(renorm_lab.cli, "RECIPES", {"microbatch": Microbatch})  # the others take seconds
    monkeypatch.setattr(job, "_report", lambda *_: None)
    good = (finished / "config.yaml").read_text()
    for name, data in outside.configs(random.Random(2), good):
        path.write_bytes(data)
        tried += 1
        if problem := said_wrongly(["run", "microbatch", "--config", str(path)], capsys):
            problems[name] = problem
    with capsys.disabled():
        print(f"{tried} tried, {len(problems)} wrong")
    assert not problems, problems


@pytest.mark.slow
def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    recipe = NonIid(methods=("batch_renorm",), seeds=1, steps=6, average=0.9, checkpoint_every=2, workers=1,
                    logger="none", out=tmp_path / "out")  # fmt: skip
    dataset = recipe.load()
    run = recipe.runs(dataset)[0]
    whole = training.train(run, dataset, recipe, lambda step: None)
    folder = next((recipe.folder / "checkpoints").iterdir())
    good = {path.name: path.read_bytes() for path in sorted(folder.glob("step-*"))[:1]}  # after 4 steps
    state = Checkpoints(recipe.folder, run).load()
    assert state is not None
    problems, tried = {}, 0
    for name, data in outside.checkpoints(state):
        for path in folder.iterdir():
            outside.remove(path)
        for kept, content in good.items():
            (folder / kept).write_bytes(content)
        bad = folder / f"step-000000005-{blake2b(data or b'', digest_size=8).hexdigest()}.pt"
        bad.mkdir() if data is None else bad.write_bytes(data)
        (folder / "step-000000001-folder.pt").mkdir()  # to be removed with those that are too old
        capsys.readouterr()
        steps: list[int] = []
        try:
            result = training.train(run, dataset, recipe, steps.append)
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            said = capsys.readouterr().err
            if steps[0] != 5 or result.curve != whole.curve or said.count("\n") != 1 or f"{bad} is damaged" not in said:
                problems[name] = f"{steps[:1]} {said!r}"
        tried += 1
    with capsys.disabled():
        print(f"{tried} tried, {len(problems)} wrong")
    assert not problems, problems


@pytest.mark.slow
@pytest.mark.parametrize("name", outside.NAMES, ids=ascii)
def test_names_are_text_everywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    np.savez(f"{name.replace('/', chr(0x2215))}.npz", **arrays())
    (path,) = Path().glob("*.npz")
    assert main([*RUN, f"--data={path}", "--out=out"]) == 0
    said = capsys.readouterr().out
    shown = "".join(said.split()).replace("│", "")
    plain = ascii(str(path))[1:-1] if re.search(r"[\x00-\x1f\ud800-\udfff]", name) else str(path)
    assert "".join(plain.split()).replace("\\\\", "\\") in shown
    assert "\x1b[31m" not in said
    with Path("out/results.csv").open(encoding="utf-8", newline="") as file:
        cell = next(csv.DictReader(file))["data"]
    assert cell[0] not in "=+-@"
    assert main([*RUN, f"--data={path}", "--out=out"]) == 0  # it knows its own
    assert main(["report", "out", "--out=report"]) == 0
    html = Path("report/report.html").read_text(encoding="utf-8")
    assert "<script>" not in html
