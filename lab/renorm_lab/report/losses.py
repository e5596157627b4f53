"""What a method loses in each regime to the best one there: which single method is safest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..summary import Summary
from .tables import TextTable


def losses(summary: Summary) -> dict[str, list[float]]:
    """Points behind the best method of each regime, with example weighing.

    Args:
        summary: means over the seeds.

    Returns:
        Losses in points in the order of the regimes, by method, least of the largest losses first; NaN where a method
        has no result, which puts it last.

    Source:
        Minimax regret (Savage 1951, The theory of statistical decision).
    """
    best = {
        regime: max(cell.mean for (_, where), cell in summary.on.items() if where == regime)
        for regime in summary.regimes
    }
    found = {
        method: [
            best[regime] - summary.on[method, regime].mean if (method, regime) in summary.on else math.nan
            for regime in summary.regimes
        ]
        for method in summary.methods
    }
    return dict(sorted(found.items(), key=lambda pair: _largest_and_mean(pair[1])))


def _largest_and_mean(values: Sequence[float]) -> tuple[float, float]:
    """To sort by: infinite where one is not known."""
    return (math.inf, math.inf) if any(map(math.isnan, values)) else (max(values), statistics.fmean(values))


def loss_table(summary: Summary) -> TextTable:
    """The losses as text.

    Args:
        summary: means over the seeds.

    Returns:
        The table; without rows where there is one regime alone, or one method.
    """
    found = losses(summary) if len(summary.regimes) > 1 else {}
    rows = [
        [method, *map(_points, (*values, *reversed(_largest_and_mean(values))))] for method, values in found.items()
    ]
    return TextTable(["method", *summary.regimes, "mean", "largest"], rows if len(rows) > 1 else [])


def _points(loss: float) -> str:
    return f"{loss:.1f}" if math.isfinite(loss) else "-"
