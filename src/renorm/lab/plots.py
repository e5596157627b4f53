"""Pictures of results: bars of the final accuracies, curves of the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .store import Results, replace_file
from .summary import Summary

# Okabe and Ito's colours, which colour-blind readers tell apart; without the yellow, which is too light for lines.
_COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PANEL_WIDTH = 4.2  # inches
_DPI = 150


def plot_bars(path: Path, summary: Summary, title: str) -> None:
    """Draw the table: a panel for each regime, and for each method a bar without and one with example weighing.

    Args:
        path: PNG file to write.
        summary: what to draw.
        title: stands above the panels.
    """
    figure, panels = _panels(summary.regimes, title, height=1.6 + 0.55 * len(summary.methods))
    places = np.arange(len(summary.methods))
    for regime, axes in zip(summary.regimes, panels, strict=True):
        for cells, offset, colour, label in (
            (summary.off, -0.2, "#56B4E9", "off"),
            (summary.on, 0.2, "#E69F00", "on (alpha chosen on validation)"),
        ):
            row = [cells[method, regime] for method in summary.methods]
            means, deviations = [cell.mean for cell in row], [cell.deviation for cell in row]
            axes.barh(places + offset, means, 0.38, xerr=deviations, color=colour, label=label,
                      error_kw={"capsize": 2, "linewidth": 1})  # fmt: skip
            for place, mean in zip(places + offset, means, strict=True):
                axes.text(1, place, f"{mean:.1f}", va="center", fontsize=8)  # at the foot, away from the whiskers
        axes.set(title=regime, xlabel="test accuracy in %", xlim=(0, 102))
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].set_yticks(places, summary.methods)
    panels[0].invert_yaxis()
    spread = "" if summary.seeds == 1 else f"; bars: mean of {summary.seeds} seeds, whiskers: standard deviation"
    _save(figure, panels[0], path, f"example weighing{spread}")


def plot_curves(path: Path, results: Results, summary: Summary, title: str) -> None:
    """Draw the validation accuracy during training: a panel for each regime, a line for each method.

    Args:
        path: PNG file to write.
        results: result of each run.
        summary: gives the order of methods and regimes.
        title: stands above the panels.
    """
    figure, panels = _panels(summary.regimes, title, height=3.6)
    for regime, axes in zip(summary.regimes, panels, strict=True):
        for method, colour, marker in zip(summary.methods, _cycle(_COLOURS), _cycle(_MARKERS), strict=False):
            curves = [result.curve for run, result in results.items() if (run.method, run.regime) == (method, regime)]
            steps = [point.step for point in curves[0]]
            accuracy = 100 * np.array([[point.validation_accuracy for point in curve] for curve in curves])
            axes.plot(steps, accuracy.mean(0), color=colour, marker=marker, markersize=3, linewidth=1.3, label=method)
            axes.fill_between(steps, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.12, linewidth=0)
        axes.set(title=regime, xlabel="training step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy in %,\nwithout example weighing")
    spread = "" if summary.seeds == 1 else f" (lines: mean of {summary.seeds} seeds, bands: smallest to largest)"
    _save(figure, panels[0], path, f"method{spread}")


def _panels(regimes: Sequence[str], title: str, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(2, len(regimes)) * _PANEL_WIDTH * 0.85 + 1, height + 1), layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0])


def _cycle(values: Sequence[str]) -> list[str]:
    return list(values) * 3  # more methods than that cannot be told apart anyway


def _save(figure: Figure, legend_of: Axes, path: Path, legend_title: str) -> None:
    handles, labels = legend_of.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, title=legend_title)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=_DPI, format="png"))
