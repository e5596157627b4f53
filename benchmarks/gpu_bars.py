"""The bars of the GPU path, from the lines of JSON that the phases leave."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from csvfiles import write_rows

Result = dict[str, Any]

_LARGE_MB, _COPY_BOUND_MB = 1.0, 64.0
NORM, FUSED = "norm", "norm+residual+relu"
TORCHS, OURS, SEQUENCE, COPY = "nn.BatchNorm2d", "BatchRenorm2d", "eager sequence", "copy"
# Least passes over a tensor, forward and backward: x twice and y; dy and x twice and dx.
PASSES, PASSES_OF_COPY = 8, 2


def read(path: Path) -> list[Result]:
    """The results so far; a last line that was cut off is left out.

    Args:
        path: file of JSON lines; none if it is not there.

    Returns:
        A dict for each.
    """
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def ratios(results: list[Result], above: str, below: str, **wanted: Any) -> dict[str, float]:
    """Times of a contender over another's, by case, among layers with these properties."""
    rows = [row for row in results if all(row.get(name) == wanted[name] for name in wanted)]
    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        case = f"{row['shape']} {row['layout']} {row['dtype']}"
        cases.setdefault(case, {})[row["contender"]] = row["ms"]
    return {case: times[above] / times[below] for case, times in cases.items() if above in times and below in times}


def _layers(results: list[Result]) -> list[Result]:
    return [row for row in results if row["phase"] == "layers" and "ms" in row]


def bandwidth_shares(results: list[Result]) -> dict[str, float]:
    """Share of the copy's bandwidth, least bytes counted, of layers over 64 MB."""
    large = [row for row in _layers(results) if row["megabytes"] > _COPY_BOUND_MB]
    times = ratios(large, OURS, COPY, variant=NORM, mode="graph")
    return {case: PASSES / PASSES_OF_COPY / ratio for case, ratio in times.items()}


def bars(results: list[Result]) -> Iterator[tuple[str, float, float | None, bool | None]]:
    """Each bar.

    Args:
        results: of all phases.

    Yields:
        What it is, its bound, the value, None where nothing was measured, and whether it is met.
    """
    large = [row for row in _layers(results) if row["megabytes"] > _LARGE_MB]
    small = [row for row in _layers(results) if row["mode"] == "eager"]

    def bar(name: str, bound: float, values: Any, reduce: Any = geometric_mean, least: bool = False) -> Any:
        values = list(values.values()) if isinstance(values, Mapping) else list(values)
        value = reduce(values) if values else None
        met = None if value is None else (value >= bound if least else value <= bound)
        return name, bound, value, met

    for dtype, bound in (("bf16", 0.70), ("fp32", 0.95)):
        found = ratios(large, OURS, TORCHS, variant=NORM, mode="graph", dtype=dtype)
        yield bar(f"over nn.BatchNorm2d, {dtype}, geometric mean", bound, found)
    yield bar("over nn.BatchNorm2d, worst", 1.05, ratios(large, OURS, TORCHS, variant=NORM, mode="graph"), max)
    for dtype, bound in (("bf16", 0.55), ("fp32", 0.65)):
        found = ratios(large, OURS, SEQUENCE, variant=FUSED, mode="graph", dtype=dtype)
        yield bar(f"fused over the eager sequence, {dtype}, geometric mean", bound, found)
    yield bar("least share of copy bandwidth over 64 MB", 0.85, bandwidth_shares(results), min, least=True)
    for phase, bound in (("resnet50", 0.88), ("compiled", 1.00)):
        steps = {row["contender"]: row["ms"] for row in results if row["phase"] == phase and row["batch"] == 128}
        fused = steps.get("fused")
        value = [fused / steps[TORCHS]] if fused and TORCHS in steps else []
        yield bar(f"ResNet-50 step, fused, over nn.BatchNorm2d, {phase}", bound, value)
    for dtype, bound in (("bf16", 1.00), ("fp32", 1.10)):
        found = ratios(small, OURS, TORCHS, variant=NORM, mode="eager", dtype=dtype)
        yield bar(f"small layers, eager, {dtype}, geometric mean", bound, found)
    for setting in ("ghost", "batch-group"):
        yield bar(f"{setting} setting over the batch setting", 1.15,
                  ratios(large, setting, OURS, variant=NORM, mode="graph"))  # fmt: skip


def summary(results: list[Result], ends: Mapping[str, str]) -> str:
    """The bars, the worst cases and all failures, as text.

    Args:
        results: of all phases.
        ends: how each phase ended.

    Returns:
        A screenful.
    """
    lines = [f"{name}: {end}" for name, end in ends.items()] + [""]
    for name, bound, value, met in bars(results):
        found = "not measured" if value is None else f"{value:.3f}"
        lines.append(f"{name:<58}{bound:>6.2f}  {found:>12}  {'' if met is None else 'met' if met else 'MISSED'}")
    worst = sorted(
        ratios(_layers(results), OURS, TORCHS, variant=NORM, mode="graph").items(), key=lambda item: -item[1]
    )[:6]
    lines += ["", "worst over nn.BatchNorm2d:", *(f"  {case}: {ratio:.2f}" for case, ratio in worst)]
    cases = [row for row in results if row["phase"] == "correctness"]
    wrong = [row for row in cases if not row["right"]]
    lines += ["", f"correctness: {len(cases)} cases, {len(wrong)} wrong"]
    lines += [f"  {row['case']}: {row.get('failure') or row['error']}" for row in wrong[:12]]
    lines += [row["failure"] for row in results if row["phase"] != "correctness" and "failure" in row][:12]
    return "\n".join(lines) + "\n"


def write_tables(out: Path) -> None:
    """Layers, models and the sweep as CSV files.

    Args:
        out: folder of results.jsonl.
    """
    results = read(out / "results.jsonl")
    for name, phases in (("layers", {"layers"}), ("models", {"resnet50", "compiled"}), ("sweep", {"sweep"})):
        rows = [row for row in results if row["phase"] in phases]
        if rows:
            columns = list(dict.fromkeys(column for row in rows for column in row))
            write_rows(out / f"{name}.csv", [{column: row.get(column, "") for column in columns} for row in rows])


def middle(values: list[float]) -> float:
    """The median, in milliseconds with 5 digits."""
    return float(f"{median(values) * 1e3:.5g}")
