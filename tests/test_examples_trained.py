"""The examples on pretrained networks: what they write, and that their pages say what was measured."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest

import renorm

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
needs_results = pytest.mark.skipif(not (EXAMPLES / "results").exists(), reason="an sdist holds no results")

for needed in ("matplotlib", "sklearn", "timm", "torchvision"):
    pytest.importorskip(needed)


def run(name: str, *options: object) -> subprocess.CompletedProcess[str]:
    source = str(Path(renorm.__file__).parents[1])
    command = [sys.executable, "-W", "error::UserWarning:renorm", str(EXAMPLES / f"{name}.py"), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def run_here(monkeypatch: pytest.MonkeyPatch, name: str, *options: object) -> None:
    """Without the seconds that torch and timm take to start."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    importlib.import_module(name).main()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits, as the examples read them."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = (15 * data.images).astype(np.uint8)[..., None], data.target
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x_train=images[:300], y_train=labels[:300], x_test=images[300:400], y_test=labels[300:400])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of a few images, in two parts."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, number in (("train", 5), ("val", 2)):
        for label in ("dark", "light"):
            (root / part / label).mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 128, (40, 36, 3), np.uint8) + np.uint8(128 * (label == "light"))
                Image.fromarray(pixels).save(root / part / label / f"{index}.png")
    return root


def check_files(out: Path, name: str) -> list[dict[str, str]]:
    assert {path.name for path in out.iterdir()} == {f"{name}.csv", f"{name}.png"}  # nothing half written is left
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return table(out / f"{name}.csv")


def test_finetune_takes_an_image_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = "--size", 32, "--epochs", 1, "--seeds", 1, "--batches", 2, "--rates", 0.01
    run_here(monkeypatch, "finetune", "--data", folder, *short, "--out", tmp_path / "out")
    rows = check_files(tmp_path / "out", "finetune")
    assert [row["method"] for row in rows] == ["batch", "frozen", "renorm", "batchgroup", "group"]
    assert all(0 <= float(row["test_on"]) <= 100 for row in rows)


@pytest.mark.slow
def test_finetune_pretrains_once_and_compares_every_method(digits: Path, tmp_path: Path) -> None:
    weights, out = tmp_path / "weights.pt", tmp_path / "out"
    start = "--pretrain", digits, "--weights", weights, "--pretrain-epochs", 1
    short = "--size", 16, "--per-class", 4, "--epochs", 1, "--seeds", 2, "--batches", 4, "--rates", 0.001, 0.01
    done = run("finetune", "--data", digits, *start, *short, "--out", out)
    assert done.returncode == 0, done.stderr
    written = weights.stat().st_mtime_ns
    rows = check_files(out, "finetune")
    assert len(rows) == 5 * (2 + 1)  # the second seed only at the better rate
    for row in rows:
        assert float(row["validation_on"]) >= float(row["validation_off"])
        if row["validation_on"] == row["validation_off"]:
            assert row["alpha"] == ("1" if row["method"] == "group" else "0")  # as it was
    again = run("finetune", "--data", digits, *start, *short, "--methods", "renorm", "--out", out)
    assert again.returncode == 0, again.stderr
    assert weights.stat().st_mtime_ns == written
    same = [row for row in rows if row["method"] == "renorm"]
    assert table(out / "finetune.csv") == same  # the same seeds give the same numbers


@pytest.mark.slow
def test_shift_finds_who_depends_on_neighbours(digits: Path, tmp_path: Path) -> None:
    short = "--size", 16, "--epochs", 2, "--seeds", 1, "--images", 60
    done = run("shift", "--data", digits, "--weights", tmp_path / "weights", *short, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = check_files(tmp_path / "out", "shift")
    assert len(rows) == 10 * (5 + 6)  # conditions and ways
    for row in rows:
        assert 0 <= float(row["accuracy"]) <= 100
        if row["method"].startswith("batch"):
            assert float(row["neighbour_influence"]) > 1e-3
        else:
            assert float(row["neighbour_influence"]) < 1e-3


@pytest.mark.slow
def test_adapt_evaluates_every_stream_in_every_way(digits: Path, tmp_path: Path) -> None:
    short = "--size", 16, "--epochs", 2, "--seeds", 1, "--images", 64
    done = run("adapt", "--data", digits, "--weights", tmp_path / "weights", *short, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = check_files(tmp_path / "out", "adapt")
    assert len(rows) == 2 * 5 * 7  # orders, streams and ways
    assert all(0 <= float(row["accuracy"]) <= 100 for row in rows)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("finetune", ["--data", "nowhere"], "--data nowhere: there is no nowhere/train"),
        ("finetune", ["--data", "nowhere.npz"], "--data nowhere.npz: there is no nowhere.npz"),
        ("finetune", ["--data", "FOLDER", "--batches", "1"], "--batches must be at least 2, got 1"),
        ("finetune", ["--data", "FOLDER", "--pretrain", "FOLDER"], "--pretrain needs --weights FILE"),
        ("finetune", ["--data", "FOLDER", "--weights", "none.pt"], "--weights none.pt: there is no such file"),
        ("shift", ["--data", "nowhere", "--weights", "OUT"], "--data nowhere: there is no nowhere/train"),
        ("adapt", ["--data", "nowhere", "--weights", "OUT"], "--data nowhere: there is no nowhere/train"),
    ],
)
def test_bad_options_are_refused(
    name: str, options: list[str], message: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"FOLDER": folder, "OUT": tmp_path / "weights"}
    given = [places.get(option, option) for option in options]
    with pytest.raises(SystemExit) as refusal:
        run_here(monkeypatch, name, *given, "--out", tmp_path / "out")
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def cells(page: str, columns: int) -> list[list[str]]:
    """Rows of the page's tables with so many columns, heads and rules too."""
    lines = [line for line in (ROOT / "docs" / f"{page}.md").read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [row for row in rows if len(row) == columns]


def spread(rows: list[dict[str, str]], column: str, digits: int) -> str:
    values = [float(row[column]) for row in rows]
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


@needs_results
def test_numbers_of_the_fine_tuning_page_are_those_of_the_table() -> None:
    rows = table(EXAMPLES / "results" / "finetune.csv")
    labels = {
        "batch norm": "batch",
        "batch norm, frozen": "frozen",
        "batch renorm": "renorm",
        "batch-group norm": "batchgroup",
        "group norm": "group",
    }
    found = [row for row in cells("finetuning", 6) if row[0].isdigit()]
    assert len(found) == 2 * len(labels)
    for batch, label, rate, *numbers in found:
        runs = [row for row in rows if (row["batch"], row["method"]) == (batch, labels[label])]
        first = [run for run in runs if run["seed"] == "0"]
        assert rate == max(first, key=lambda run: float(run["validation_on"]))["rate"]
        chosen = [run for run in runs if run["rate"] == rate]
        assert len(chosen) == 3
        assert numbers == [spread(chosen, "test_off", 1), spread(chosen, "test_on", 1), spread(chosen, "alpha", 2)]


@needs_results
def test_numbers_of_the_page_on_shifted_images_are_those_of_the_table() -> None:
    rows = table(EXAMPLES / "results" / "shift.csv")
    conditions = list(dict.fromkeys((row["corruption"], row["severity"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    _, _, *found = cells("shift", 1 + len(conditions))
    assert len(found) == len(methods)
    for method, (_, *numbers) in zip(methods, found, strict=True):
        by_condition = [
            [row for row in rows if (row["corruption"], row["severity"], row["method"]) == (*condition, method)]
            for condition in conditions
        ]
        assert {len(runs) for runs in by_condition} == {3}
        assert numbers == [f"{mean(float(run['accuracy']) for run in runs):.1f}" for runs in by_condition]


@needs_results
def test_numbers_of_the_page_on_streams_are_those_of_the_table() -> None:
    rows = table(EXAMPLES / "results" / "adapt.csv")
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    methods = {"plain evaluation": "plain", "statistics anew": "estimated", "batch statistics": "batch", "Tent": "tent",
               "`renorm.adapt`": "adapt"}  # fmt: skip
    found = [row for row in cells("shift", 1 + len(conditions)) if row[0].split(",")[0] in methods]
    assert len(found) == 10
    for label, *numbers in found:
        name, *rest = label.split(", ")
        order = "sorted by class" if "sorted by class" in rest else "mixed"
        method = methods[name] + ", single images" * ("one by one" in rest)
        by_condition = [
            [row for row in rows if (row["condition"], row["order"], row["method"]) == (condition, order, method)]
            for condition in conditions
        ]
        assert {len(runs) for runs in by_condition} == {3}
        assert numbers == [f"{mean(float(run['accuracy']) for run in runs):.1f}" for runs in by_condition]


def test_networks_of_few_classes_a_batch_are_trained_inspected_and_weighed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_here(monkeypatch, "trained", "--steps", 30, "--seeds", 1, "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"trained-digits.csv", "trained-digits.png"}
    rows = table(tmp_path / "trained-digits.csv")
    assert [(row["regime"], row["metric"]) for row in rows] == [
        (regime, metric) for regime in ("independent", "few classes") for metric in ("accuracy", "cross_entropy")
    ]
    assert float(rows[0]["between_within"]) < 1.5 < 3 < float(rows[2]["between_within"])
    for row in rows:
        assert float(row["gain_low"]) <= float(row["gain"]) <= float(row["gain_high"])
        assert float(row["passes"]) <= 8


@needs_results
def test_numbers_of_the_page_on_trained_models_are_those_of_the_tables() -> None:
    found = [row for row in cells("trained-models", 5) if row[0].startswith(("digits", "cifar100"))]
    assert len(found) == 4
    for label, *numbers in found:
        data, regime = label.split(", ")
        rows = [row for row in table(EXAMPLES / "results" / f"trained-{data}.csv") if row["metric"] == "accuracy"]
        runs = [row for row in rows if row["regime"] == regime]
        sure = sum(float(run["gain_low"]) > 0 for run in runs)
        varies = f"{mean(float(run['between_within']) for run in runs):.1f}"
        tests = [spread(runs, column, 1) for column in ("test_before", "test_after")]
        assert numbers == [varies, f"{sure} of {len(runs)}", *tests]
        assert {run["worst"] for run in runs} == {"none" if regime == "independent" else "between_within"}


@pytest.mark.slow
def test_networks_are_weighed_without_labels_and_with_them(tmp_path: Path) -> None:
    done = run("unlabelled", "--steps", 200, "--seeds", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = check_files(tmp_path, "unlabelled-digits")
    regimes = ("workers", "few classes", "independent, 2", "independent, 4", "independent, 32")
    assert {row["regime"] for row in rows} == set(regimes)
    assert len(rows) == len(regimes) * 10
    workers = {row["way"]: float(row["test_accuracy"]) for row in rows if row["regime"] == "workers"}
    assert workers["by training mode"] > workers["as trained"] + 20
    for row in rows:
        if row["is_noise"] == "True":
            assert float(row["alpha"]) == 0


@needs_results
def test_numbers_of_the_page_on_weighing_without_labels_are_those_of_the_tables() -> None:
    ways = {
        "as trained": "as trained",
        "labels": "by labels",
        "training mode": "by training mode",
        "the same, shuffled batches": "by training mode, shuffled",
        "moments (EvalNorm)": "by moments",
        "1 / n (EvalNorm)": "1 / n",
    }
    found = [row for row in cells("trained-models", 6) if row[0].partition(": ")[2] in ways]
    assert len(found) == 2 * len(ways)
    for label, *numbers in found:
        data, _, way = label.partition(": ")
        rows = [row for row in table(EXAMPLES / "results" / f"unlabelled-{data}.csv") if row["way"] == ways[way]]
        regimes = ("workers", "few classes", "independent, 2", "independent, 4", "independent, 32")
        runs = [[float(row["test_accuracy"]) for row in rows if row["regime"] == regime] for regime in regimes]
        assert {len(run) for run in runs} == {3}
        assert numbers == [f"{mean(run):.1f}" for run in runs]


@needs_results
def test_claims_of_the_page_on_weighing_without_labels_are_those_of_the_tables() -> None:
    means: dict[tuple[str, str, str], float] = {}
    lost = []
    for data in ("digits", "cifar100"):
        rows = table(EXAMPLES / "results" / f"unlabelled-{data}.csv")
        for row in rows:
            runs = [run for run in rows if (run["regime"], run["way"]) == (row["regime"], row["way"])]
            means[data, row["regime"], row["way"]] = mean(float(run["test_accuracy"]) for run in runs)
            if row["way"] == "as trained":
                (own,) = (
                    run for run in rows
                    if (run["regime"], run["seed"], run["way"]) == (row["regime"], row["seed"], "by training mode")
                )  # fmt: skip
                lost.append(float(row["test_accuracy"]) - float(own["test_accuracy"]))

    def share(data: str, regime: str, way: str) -> str:
        before, labels, own = (means[data, regime, name] for name in ("as trained", "by labels", way))
        return f"{(own - before) / (labels - before):.0%}"

    page = " ".join((ROOT / "docs" / "trained-models.md").read_text(encoding="utf-8").split())
    shuffled = [share(data, "workers", "by training mode, shuffled") for data in ("digits", "cifar100")]
    assert f"{shuffled[0]} of it on digits, {shuffled[1]} on CIFAR-100" in page
    assert f"Independent pairs on CIFAR-100: {share('cifar100', 'independent, 2', 'by training mode')} of it" in page
    assert sorted(lost)[-2] <= 0 < max(lost)
    assert f"one network on digits, which lost {max(lost):.1f} points" in page
    apart = [
        abs(means[data, regime, way] - means[data, regime, "by training mode"])
        for data, regime, way in means
        if way == "by training mode, each layer"
    ]
    assert f"stayed within {max(apart):.1f} points of one for all" in page
    independent = [key[:2] for key in means if key[1].startswith("independent")]
    losses = {
        way: max(means[(*place, "as trained")] - means[(*place, way)] for place in independent)
        for way in ("1 / n", "by moments", "by outputs")
    }
    assert f"the rule lost up to {losses['1 / n']:.0f} points, moments {losses['by moments']:.1f}." in page
    assert f"lost up to {losses['by outputs']:.1f} where nothing" in page
