"""The benchmarks: that contenders compute the same, that memory and bars are counted right, that the scripts run."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("ours", "other"), [("BatchRenorm2d", "plain code"), ("BatchNorm2d", "nn.BatchNorm2d")])
def test_contenders_compute_the_same(ours: str, other: str, relu: bool, residual: bool) -> None:
    import contenders

    x, shortcut, dy = (torch.randn(4, 16, 5, 5) for _ in range(3))
    extra = {"residual": shortcut} if residual else {}
    results = []
    for name in (ours, other):
        layer = (contenders.EAGER | contenders.GROUPINGS)[name](16, relu)
        leaf = x.clone().requires_grad_()
        y = layer(leaf, **extra)
        results.append((y, *torch.autograd.grad(y, (leaf, *layer.parameters()), dy)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected.reshape(actual.shape), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_onednn_computes_the_same(relu: bool, memory_format: torch.memory_format) -> None:
    import onednn

    if not onednn.available():
        pytest.skip("needs onednn-cpu-gomp")
    layer, other = onednn.OneDnnBatchNorm2d(16, relu), nn.BatchNorm2d(16)
    for index, parameter in enumerate(layer.parameters()):
        nn.init.uniform_(parameter, 0.5, 1.5)
        list(other.parameters())[index].data.copy_(parameter)
    x = torch.randn(4, 16, 5, 5).contiguous(memory_format=memory_format).requires_grad_()
    dy, results = torch.randn_like(x), []
    for each in (layer, nn.Sequential(other, nn.ReLU()) if relu else other):
        y = each(x)
        results.append((y, *torch.autograd.grad(y, (x, *each.parameters()), dy)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_memory_saved_for_backward_is_that_of_distinct_storages() -> None:
    import contenders
    import memory

    x = torch.randn(8, 16, 32, 32).requires_grad_()
    saved = memory.saved_bytes(contenders.EAGER[contenders.BATCH_NORM](16, True), x)
    assert saved == pytest.approx(2 * x.nbytes, rel=0.01)  # the input, for the norm, and the output, for ReLU


def test_peak_memory_counts_what_is_alive_at_a_time() -> None:
    import memory

    x = torch.randn(1_000_000)
    assert memory.peak_bytes(lambda: ((x + 1) + 1) + 1) == pytest.approx(2 * x.nbytes, rel=1e-3)
    assert memory.peak_bytes(lambda: torch.stack((x + 1, x + 2))) == pytest.approx(4 * x.nbytes, rel=1e-3)


def test_rounds_go_on_for_the_least_number_and_until_the_time_is_over() -> None:
    from harness import Budget, interleave

    calls: list[str] = []

    def step(name: str, seconds: float) -> dict[str, float]:
        calls.append(name)
        return {"forward": seconds}

    steps = {"a": lambda: step("a", 0.001), "b": lambda: step("b", 0.002)}
    samples = interleave(steps, Budget(seconds=0, least_rounds=3, warmup=1))
    assert len(calls) == 2 * (1 + 3)
    assert samples["b"].row("forward")["median_ms"] == 2
    assert samples["b"].row("forward")["rounds"] == 3
    assert interleave(steps, Budget(seconds=0.01, least_rounds=1))["a"].row("forward")["rounds"] > 1


def row(contender: str, milliseconds: float, **others: Any) -> dict[str, Any]:
    """A row of layers.csv."""
    common = {
        "allocator": "kept", "threads": 1, "network": "any", "shape": "1x1x1x1", "megabytes": 2.0, "mode": "train",
        "layout": "contiguous", "variant": "norm", "direction": "both",
    }  # fmt: skip
    return common | {"contender": contender, "median_ms": milliseconds, "least_ms": milliseconds} | others


def test_bars_are_means_and_worst_cases_of_ratios_on_the_same_case() -> None:
    from bars import all_bars

    layers = [
        row("nn.BatchNorm2d", 1.0),
        row("BatchRenorm2d", 0.2),
        row("nn.BatchNorm2d", 1.0, shape="2x2x2x2"),
        row("BatchRenorm2d", 1.8, shape="2x2x2x2"),
        row("nn.BatchNorm2d", 100.0, allocator="default"),
        row("BatchRenorm2d", 0.1, threads=64),
    ]
    found = {bar.subject: bar for bar in all_bars(layers, models=[], memory=[], workers=[])}
    mean = found["BatchRenorm2d / nn.BatchNorm2d, norm, contiguous"]
    assert mean.measured == pytest.approx(0.6)
    assert mean.verdict == "NOT MET"
    worst = found["any input of 1 MB or more, 1 or 2 threads"]
    assert worst.measured == pytest.approx(1.8)
    assert "2x2x2x2" in worst.remark
    assert found["saved for backward, norm + ReLU"].verdict == "not measured"


def test_the_speed_up_of_large_inputs_is_that_of_the_least_times() -> None:
    from bars import all_bars

    large = {"megabytes": 9.0, "median_ms": 100.0}
    layers = [
        row("BatchRenorm2d", 1.0, **large),
        row("BatchRenorm2d", 0.6, threads=2, **large),
        row("copy", 1.0, direction="forward", **large),
        row("copy", 0.9, direction="forward", threads=2, **large),
        row("BatchRenorm2d", 1.0),
        row("BatchRenorm2d", 0.1, threads=2),
    ]
    found = {bar.subject: bar for bar in all_bars(layers, models=[], memory=[], workers=[])}
    bar = found["BatchRenorm2d, 2 threads / 1, over 8 MB, contiguous"]
    assert bar.measured == pytest.approx(0.6)
    assert bar.remark.endswith("a copy 0.90")
    assert found["BatchRenorm2d, 2 threads / 1, over 8 MB, channels_last"].verdict == "not measured"


def test_the_readme_says_what_was_measured() -> None:
    from bars import all_bars
    from csvfiles import read_rows

    layers, models, memory, workers, small = (
        read_rows(BENCHMARKS / "results" / f"{name}.csv") for name in ("layers", "models", "memory", "workers", "small")
    )
    measured = {bar.subject: bar.measured for bar in all_bars(layers, models, memory, workers)}
    of_layers = (
        measured[f"BatchRenorm2d / nn.BatchNorm2d, norm, {layout}"] for layout in ("contiguous", "channels_last")
    )
    worst = max(float(row["ratio"]) for row in small if row["contender"] == "BatchRenorm2d")
    step = measured["training step, ResNet-18 CIFAR, BatchRenorm2d"]
    readme = " ".join((BENCHMARKS.parent / "README.md").read_text(encoding="utf-8").split())
    assert (
        "costs {:.2f} of nn.BatchNorm2d in contiguous format and {:.2f} in channels_last, on average over the layers "
        "of three networks, on inputs of a few KB up to {:.2f}; a training step of ResNet-18 {:.2f}"
    ).format(*of_layers, worst, step) in readme


def test_a_regression_is_the_ratio_of_medians_of_alternating_visits() -> None:
    import regression

    visits: list[str] = []

    def version(name: str, seconds: list[float]) -> Any:
        return SimpleNamespace(name=name, seconds=lambda case: visits.append(name) or seconds.pop(0))

    warmup = [9.0] * 3
    base, head = version("base", [*warmup, 1.0, 1.0, 5.0]), version("head", [*warmup, 2.0, 0.1, 3.0])
    assert regression.ratio("any", base, head, rounds=3) == pytest.approx(2.0)
    assert all(set(visits[turn : turn + 2]) == {"base", "head"} for turn in range(0, len(visits), 2))


def test_ratios_of_inference_are_those_of_a_round() -> None:
    from harness import Samples, ratio

    ours, weighted = (Samples({"step": times}) for times in ([1.0, 10.0, 2.0], [3.0, 20.0, 2.0]))
    assert ratio(weighted, ours) == {"ratio": 2.0, "lower_quartile_ratio": 1.0, "upper_quartile_ratio": 3.0}


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_exported_contenders_compute_the_same_and_only_a_weight_needs_nodes() -> None:
    import contenders
    import export

    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    nodes = {}
    for name, change in export.CONTENDERS.items():
        ours = change(copy.deepcopy(model))
        file = export.exported(ours, x[:2], threads=1)
        with torch.no_grad():
            assert_close(file(x), ours(x), atol=1e-5, rtol=1e-5)
        nodes[name] = file.nodes
    assert nodes[contenders.OURS] == nodes[contenders.BATCH_NORM] == 2  # batch norm is inside the convolution
    assert nodes[contenders.OURS_WEIGHTED] > 10


@pytest.mark.slow
def test_every_script_runs_from_measuring_to_the_page(tmp_path: Path) -> None:
    for script in ("layers", "models", "memory", "workers", "export", "crossq", "small"):
        run(script, "--quick", "--out", str(tmp_path))
    printed = run("report", "--results", str(tmp_path), "--docs", str(tmp_path / "docs"))
    assert "BatchRenorm2d / plain code" in printed
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "$" not in page
    for figure in ("copies.png", "models.png"):
        assert (tmp_path / "docs" / "figures" / figure).stat().st_size > 0
        assert f"figures/{figure}" in page


class TestGpu:
    def layer(self, contender: str, milliseconds: float, **change: Any) -> dict[str, Any]:
        return {
            "phase": "layers", "shape": "s", "megabytes": 65.0, "layout": "contiguous", "dtype": "bf16",
            "variant": "norm", "mode": "graph", "contender": contender, "ms": milliseconds,
        } | change  # fmt: skip

    def test_the_share_of_the_bandwidth_counts_eight_passes(self) -> None:
        import gpu_bars

        rows = [self.layer("copy", 2.0), self.layer("BatchRenorm2d", 10.0)]
        small = [
            self.layer("copy", 1.0, megabytes=1.0, shape="t"),
            self.layer("BatchRenorm2d", 1.0, megabytes=1.0, shape="t"),
        ]
        shares = gpu_bars.bandwidth_shares(rows + small)
        assert shares == {"s contiguous bf16": pytest.approx(8 / 2 * 2.0 / 10.0)}

    def test_bars_are_met_missed_or_not_measured(self) -> None:
        import gpu_bars

        rows = [self.layer("nn.BatchNorm2d", 10.0), self.layer("BatchRenorm2d", 8.0)]
        found = {name: (value, met) for name, _, value, met in gpu_bars.bars(rows)}
        assert found["over nn.BatchNorm2d, bf16, geometric mean"] == (pytest.approx(0.8), False)
        assert found["over nn.BatchNorm2d, worst"] == (pytest.approx(0.8), True)
        assert found["over nn.BatchNorm2d, fp32, geometric mean"] == (None, None)
        assert "MISSED" in gpu_bars.summary(rows, {"layers": "done"})

    def test_a_line_that_was_cut_off_costs_no_other(self, tmp_path: Path) -> None:
        import gpu_bars

        path = tmp_path / "results.jsonl"
        path.write_text('{"phase": "layers"}\n{"phase": "la', encoding="utf-8")
        assert gpu_bars.read(path) == [{"phase": "layers"}]

    @pytest.mark.slow
    def test_every_phase_runs_without_a_device(self, tmp_path: Path) -> None:
        printed = run("gpu", "--dry", "--out", str(tmp_path))
        assert "0 wrong" in printed
        assert {path.name for path in tmp_path.iterdir()} == {
            "results.jsonl", "summary.txt", "layers.csv", "models.csv", "sweep.csv", "logs.tar.gz"
        }  # fmt: skip

    @pytest.mark.slow
    def test_a_job_goes_on_in_another_folder(self, tmp_path: Path) -> None:
        job = ("--", "workers", "--seeds", "1", "--steps", "200", "--methods", "[batch_norm,group_norm]")
        first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
        assert "stopped" in run("gpu_lab", "run", str(first), "--out", str(out), "--seconds", "9", *job)
        second.mkdir()
        (out / "job.tar.gz").rename(second / "job.tar.gz")
        assert "done" in run("gpu_lab", "run", str(second), "--out", str(out), "--seconds", "300", *job)
        assert (second / "job" / "results.csv").exists()


def run(script: str, *arguments: str) -> str:
    """Run a script as a user would, and return what it prints."""
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
