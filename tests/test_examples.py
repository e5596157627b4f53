"""The examples as their readers run them: each writes its table and its picture, and refuses what it cannot do."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev

import pytest

import renorm

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
needs_results = pytest.mark.skipif(not (EXAMPLES / "results").exists(), reason="an sdist holds no results")
PAGE = ROOT / "docs" / "several-forwards.md"
LABELS = {"renorm": "batch renorm", "batch": "batch norm", "none": "no norm"}  # in the order of the page's columns

pytest.importorskip("matplotlib")


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(renorm.__file__).parents[1])
    command = [sys.executable, "-W", "error::UserWarning:renorm", str(EXAMPLES / f"{name}.py"), *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": source}
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_files(folder: Path, name: str) -> list[dict[str, str]]:
    assert {path.name for path in folder.iterdir()} == {f"{name}.csv", f"{name}.png"}  # nothing half written is left
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return table(folder / f"{name}.csv")


def test_merged_statistics_serve_clients_that_lie_apart(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    done = run("federated", "--seeds", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for row in check_files(tmp_path, "federated"):
        apart = float(row["merged"]) - float(row["averaged"])
        assert apart > 0.05 if row["scanners"] == "a brightness each" else abs(apart) < 0.03


@needs_results
def test_the_page_of_federated_learning_has_the_committed_figures() -> None:
    rows = table(EXAMPLES / "results" / "federated.csv")
    apart = [row for row in rows if row["scanners"] == "a brightness each"]
    averaged, merged = ([round(100 * float(row[name])) for row in apart] for name in ("averaged", "merged"))
    page = " ".join((ROOT / "docs" / "dependent-batches.md").read_text(encoding="utf-8").split())
    assert f"with averaged buffers {min(averaged)} to {max(averaged)}% are right, merged {min(merged)} to" in page
    assert f"to {max(merged)}% ([{len(apart)} seeds]" in page


def test_an_ensemble_is_the_same_by_vmap_and_one_by_one(tmp_path: Path) -> None:
    done = run("ensemble", "--sizes", "1", "--seeds", "1", "--rounds", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (row,) = check_files(tmp_path, "ensemble")
    assert row["members"] == "10"
    assert float(row["difference"]) < 1e-9
    assert float(row["vmap_ms"]) > 0
    assert float(row["loop_ms"]) > 0


@needs_results
def test_the_page_of_the_ensemble_has_the_committed_figures() -> None:
    rows = table(EXAMPLES / "results" / "ensemble.csv")
    assert max(float(row["difference"]) for row in rows) <= 1e-10
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()]
    found = [line for line in cells if len(line) == 4 and line[0].isdigit()]
    sizes = dict.fromkeys((row["members"], f"{row['width']}, {row['batch']}") for row in rows)
    assert [tuple(line[:2]) for line in found] == list(sizes)
    for members, size, *figures in found:
        width, batch = size.split(", ")
        chosen = [row for row in rows if (row["members"], row["width"], row["batch"]) == (members, width, batch)]
        assert [row["seed"] for row in chosen] == ["0", "1", "2"]
        columns = ([float(row[name]) for row in chosen] for name in ("loop_over_vmap", "loop_over_compiled"))
        assert figures == [f"{median(column):.2f} ({min(column):.2f} to {max(column):.2f})" for column in columns]


@pytest.mark.slow
def test_crossq_writes_table_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    done = run("crossq", "--steps", "10", "--seeds", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = check_files(tmp_path, "crossq")
    assert [row["norm"] for row in rows if row["step"] == "10"] == ["renorm", "batch", "none"]
    assert all(-2_000 < float(row["return"]) < 0 for row in rows)  # what Pendulum can give
    assert "mean over training" in done.stdout


@pytest.mark.slow
def test_crossq_of_sb3_contrib_writes_table_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("sb3_contrib")
    done = run("crossq_sb3", "--steps", "10", "--seeds", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = check_files(tmp_path, "crossq_sb3")
    last = [(row["layer"], row["seed"]) for row in rows if row["step"] == "10"]
    assert last == [("sb3-contrib", "0"), ("renorm", "0"), ("sb3-contrib", "1"), ("renorm", "1")]
    assert "difference" in done.stdout


@pytest.mark.slow
def test_gan_writes_table_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    done = run("gan", "--steps", "3", "--seeds", "2", "--norm", "batch", "renorm", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = check_files(tmp_path, "gan")
    last = [(row["norm"], row["seed"]) for row in rows if row["step"] == "3"]
    assert last == [("batch", "0"), ("renorm", "0"), ("batch", "1"), ("renorm", "1")]
    assert all(0 <= float(row["accuracy_eval"]) <= 1 and float(row["distance_eval"]) > 0 for row in rows)


@pytest.mark.slow
def test_recurrent_writes_table_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    done = run("recurrent", "--steps", "30", "--seeds", "2", "--rates", "0.01", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = check_files(tmp_path, "recurrent")
    assert {row["method"] for row in rows} == {"nn.LSTM", "batch norm per step", "BatchRenormLSTM"}
    assert all(0 <= float(row["test_accuracy"]) <= 100 for row in rows)
    assert len(rows) == 3 * 2 * 20


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("crossq", ["--steps", "0"], "must be at least 1, got 0"),
        ("crossq", ["--env", "CartPole-v1"], "must be vectors of real numbers, got Discrete(2)"),
        ("crossq", ["--env", "Nowhere-v0"], "--env Nowhere-v0: "),
        ("crossq_sb3", ["--seeds", "0"], "must be at least 1, got 0"),
        ("ensemble", ["--rounds", "0"], "must be at least 1, got 0"),
        ("recurrent", ["--steps", "0"], "must be at least 1, got 0"),
        ("gan", ["--norm", "layer"], "invalid choice: 'layer'"),
    ],
)
def test_bad_options_are_refused(name: str, options: list[str], message: str, tmp_path: Path) -> None:
    if name.startswith("crossq"):
        pytest.importorskip("gymnasium" if name == "crossq" else "sb3_contrib")
    done = run(name, *options, "--out", str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def late_means(rows: list[dict[str, str]], norm: str, column: str, after: float) -> list[float]:
    """Of each seed, over the rows of steps beyond `after`."""
    runs: dict[str, list[float]] = {}
    for row in rows:
        if row["norm"] == norm and int(row["step"]) > after:
            runs.setdefault(row["seed"], []).append(float(row[column]))
    assert len(runs) == 3
    return [mean(run) for run in runs.values()]


def page_rows() -> dict[str, list[str]]:
    lines = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


@needs_results
def test_numbers_of_the_page_are_those_of_the_tables() -> None:
    cells = page_rows()
    returns = table(EXAMPLES / "results" / "crossq.csv")
    for norm, label in LABELS.items():
        last, average = (late_means(returns, norm, "return", after) for after in (5_999, 0))
        assert cells[label][:2] == [spread(last, 1), spread(average, 1)]
    measured = table(EXAMPLES / "results" / "gan.csv")
    for label, column in (
        ("discriminator's accuracy", "accuracy"),
        ("mean logit of real minus fake", "logit_gap"),
        ("generator's distance", "distance"),
    ):
        for mode, name in (("training mode", "train"), ("evaluation", "eval")):
            expected = [spread(late_means(measured, norm, f"{column}_{name}", 4_000 * 2 / 3), 2) for norm in LABELS]
            assert cells[f"{label}, {mode}"] == expected


@needs_results
def test_numbers_of_sb3_contrib_s_crossq_are_those_of_the_table() -> None:
    stats = pytest.importorskip("scipy.stats")
    rows = table(EXAMPLES / "results" / "crossq_sb3.csv")
    runs = {
        layer: [
            [float(row["return"]) for row in rows if (row["layer"], row["seed"]) == (layer, str(seed))]
            for seed in range(5)
        ]
        for layer in ("sb3-contrib", "renorm")
    }
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    cells = {first: others for first, *others in lines}
    found = {layer: ([run[-1] for run in each], [mean(run) for run in each]) for layer, each in runs.items()}
    for layer, columns in found.items():
        assert cells[f"{layer}'s layer"] == [spread(values, 1) for values in columns]
    for cell, theirs, ours in zip(cells["difference"], *found.values(), strict=True):
        differences = [b - a for a, b in zip(theirs, ours, strict=True)]
        low, high = stats.t.interval(0.95, 4, mean(differences), stats.sem(differences))
        assert cell == f"{mean(differences):.1f} ({low:.1f} to {high:.1f})"


@needs_results
def test_numbers_of_the_recurrent_page_are_those_of_the_table() -> None:
    found = table(EXAMPLES / "results" / "recurrent.csv")
    lines = [line.split("|")[1:-1] for line in (ROOT / "docs" / "recurrent.md").read_text().splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == 5 and line[0].strip()[:2] == "0."]
    assert len(cells) == 9
    for rate, method, *columns in cells:
        for step, cell in zip(("800", "2000", "4000"), columns, strict=True):
            wanted = {"learning_rate": rate, "method": method, "step": step}
            values = [float(row["test_accuracy"]) for row in found if wanted.items() <= row.items()]
            assert len(values) == 3
            assert cell == f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
