"""What a method loses in each regime to the best one there: which single method is safest."""

from __future__ import annotations

import statistics

from ..summary import Summary
from .tables import TextTable


def losses(summary: Summary) -> dict[str, list[float]]:
    """Points behind the best method of each regime, with example weighing.

    Args:
        summary: means over the seeds.

    Returns:
        Losses in points in the order of the regimes, by method, least of the largest losses first; methods that are
        not there in every regime are left out, but the best is the best of all.

    Source:
        Minimax regret (Savage 1951, The theory of statistical decision).
    """
    best = {
        regime: max(cell.mean for (_, where), cell in summary.on.items() if where == regime)
        for regime in summary.regimes
    }
    found = {
        method: [best[regime] - summary.on[method, regime].mean for regime in summary.regimes]
        for method in summary.methods
        if all((method, regime) in summary.on for regime in summary.regimes)
    }
    return dict(sorted(found.items(), key=lambda pair: (max(pair[1]), statistics.fmean(pair[1]))))


def loss_table(summary: Summary) -> TextTable:
    """The losses as text.

    Args:
        summary: means over the seeds.

    Returns:
        The table; without rows where there is one regime alone, or one method.
    """
    found = losses(summary) if len(summary.regimes) > 1 else {}
    rows = [
        [method, *(f"{loss:.1f}" for loss in (*values, statistics.fmean(values), max(values)))]
        for method, values in found.items()
    ]
    return TextTable(["method", *summary.regimes, "mean", "largest"], rows if len(rows) > 1 else [])
