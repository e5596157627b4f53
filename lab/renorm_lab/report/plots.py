"""Pictures of results: bars of the final accuracies, curves of the training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from renorm.markup import picture_text

from ..results import Results
from ..runs import CurvePoint
from ..store import save_file
from ..summary import Summary

# Okabe and Ito's colours, which colour-blind readers tell apart; without the yellow, which is too light for lines.
_COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PANEL_WIDTH = 4.2  # inches
_COLUMNS = 4  # panels side by side
_DPI = 150
_GAP = 0.05  # between panels, of their width, so that numbers below one do not touch those of the next
_LABEL = 0.08  # of the axis, which a bar's number takes
_LETTERS = 10.5  # of a title on an inch
_NARROW, _WIDE = 26, 36  # letters of a name on a line, beside one panel and beside several


@contextmanager
def _without_glyphs() -> Iterator[None]:
    """A block in which letters that the font has not are drawn as boxes, and no more is said of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def plot_bars(path: Path, summary: Summary, title: str) -> None:
    """Draw the table: a panel for each regime, and for each method a bar without and one with example weighing.

    Args:
        path: PNG file to write.
        summary: what to draw.
        title: stands above the panels.
    """
    _save_png(draw_bars(summary, summary.regimes, title), path)


def plot_curves(path: Path, results: Results, summary: Summary, title: str) -> None:
    """Draw the validation accuracy during training: a panel for each regime, a line for each method.

    Args:
        path: PNG file to write.
        results: result of each run.
        summary: gives the order of methods and regimes.
        title: stands above the panels.
    """
    _save_png(draw_curves(results, summary, summary.regimes, title), path)


@_without_glyphs()
def draw_bars(summary: Summary, regimes: Sequence[str], title: str) -> Figure:
    """Bars of some regimes.

    Args:
        summary: what to draw.
        regimes: a panel for each.
        title: stands above the panels.

    Returns:
        The figure.
    """
    figure, panels = _panels(regimes, title, height=1.6 + 0.55 * len(summary.methods))
    places, end = np.arange(len(summary.methods)), _end_of_axis(summary)
    for regime, axes in zip(regimes, panels, strict=True):
        for cells, offset, colour, label in (
            (summary.off, -0.2, "#56B4E9", "off"),
            (summary.on, 0.2, "#E69F00", "on (alpha chosen on validation)"),
        ):
            finished = [(place + offset, cells[method, regime]) for place, method in zip(places, summary.methods,
                        strict=True) if (method, regime) in cells]  # fmt: skip
            at, means = [place for place, _ in finished], [cell.mean for _, cell in finished]
            spreads = None if summary.seeds == "1 seed" else [cell.deviation for _, cell in finished]
            axes.barh(at, means, 0.38, xerr=spreads, color=colour, label=label,
                      error_kw={"capsize": 2, "linewidth": 1})  # fmt: skip
            for place, mean in zip(at, means, strict=True):
                behind = colour if mean > _LABEL * end else "white"  # or the number of a short bar looked like its end
                axes.text(end / 100, place, f"{mean:.1f}", va="center", fontsize=8, zorder=5,
                          bbox={"facecolor": behind, "edgecolor": "none", "pad": 0.5})  # fmt: skip
        axes.set(title=picture_text(regime), xlabel=f"test {summary.score} in %", xlim=(0, end))
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].set_yticks(places, _wrapped(summary.methods, len(panels)))
    panels[0].invert_yaxis()
    spread = "" if summary.seeds == "1 seed" else f"; bars: mean of {summary.seeds}, whiskers: standard deviation"
    _add_legend(figure, f"example weighing{spread}")
    return figure


def _end_of_axis(summary: Summary) -> float:
    """The same for all panels of a table: a bit more than its longest bar with its whisker, but no more than 100%."""
    cells = (*summary.off.values(), *summary.on.values())
    return min(102.0, max([1.0, *(1.1 * (cell.mean + cell.deviation) for cell in cells)]))


@_without_glyphs()
def draw_curves(results: Results, summary: Summary, regimes: Sequence[str], title: str) -> Figure:
    """Curves of some regimes.

    Args:
        results: result of each run.
        summary: gives the order of methods.
        regimes: a panel for each.
        title: stands above the panels.

    Returns:
        The figure.
    """
    figure, panels = _panels(regimes, title, height=3.6)
    for regime, axes in zip(regimes, panels, strict=True):
        for method, (colour, marker, line) in zip(summary.methods, _styles(), strict=False):
            curves = curves_of(results, method, regime)
            if not curves:
                continue
            steps = [point.step for point in curves[0]]
            accuracy = 100 * np.array([[point.validation_accuracy for point in curve] for curve in curves])
            axes.plot(steps, accuracy.mean(0), color=colour, marker=marker, linestyle=line, markersize=3, linewidth=1.3,
                      label=picture_text(method))  # fmt: skip
            axes.fill_between(steps, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.12, linewidth=0)
        axes.set(title=picture_text(regime), xlabel="training step")
        axes.grid(alpha=0.3)
    for axes in panels[::_COLUMNS]:
        axes.set_ylabel(f"validation {summary.score} in %,\nwithout example weighing")
    spread = "" if summary.seeds == "1 seed" else f" (lines: mean of {summary.seeds}, bands: smallest to largest)"
    _add_legend(figure, f"method{spread}")
    return figure


def curves_of(results: Results, method: str, regime: str) -> list[tuple[CurvePoint, ...]]:
    """Curves of the seeds of one method in one regime.

    Args:
        results: result of each run.
        method: row of the table.
        regime: column of the table.

    Returns:
        Those that are known: a folder's curves.csv may lack some.
    """
    found = [result.curve for run, result in results.items() if (run.method, run.regime) == (method, regime)]
    return [curve for curve in found if curve]


@_without_glyphs()
def as_svg(figure: Figure) -> str:
    """A figure as text, the same for the same figure.

    Args:
        figure: the figure.

    Returns:
        An SVG document.
    """
    text = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "renorm"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _panels(regimes: Sequence[str], title: str, height: float) -> tuple[Figure, list[Axes]]:
    columns, rows = min(_COLUMNS, len(regimes)), math.ceil(len(regimes) / _COLUMNS)
    width = _PANEL_WIDTH * 0.85 * columns + 1 if columns > 1 else 5.2
    figure = Figure(figsize=(width, height * rows + 1), layout=ConstrainedLayoutEngine(wspace=_GAP))
    if title:
        figure.suptitle(picture_text(fill(title, round(_LETTERS * width))))
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for spare in panels[len(regimes) :]:
        spare.remove()
    return figure, panels[: len(regimes)]


def _styles() -> Iterator[tuple[str, str, str]]:
    """Colour, marker and line of one method after the other."""
    for line in ("-", "--", ":"):  # more methods than that cannot be told apart anyway
        yield from ((colour, marker, line) for colour, marker in zip(_COLOURS, _MARKERS, strict=True))


def _add_legend(figure: Figure, title: str) -> None:
    drawn = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes)
    handles = {label: handle for pairs in drawn for handle, label in pairs}  # not every method is in every panel
    one = len(figure.axes) == 1
    if one:
        title = title.replace("; ", ";\n").replace(" (", "\n(")
    for columns in range(2 if one else 3, 0, -1):
        legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, title=title)
        if legend.get_window_extent().width < 0.98 * figure.bbox.width:  # its frame too is within the picture
            return
        if columns > 1:
            legend.remove()


def _wrapped(names: Sequence[str], panels: int) -> list[str]:
    return [picture_text(fill(name, _NARROW if panels == 1 else _WIDE)) for name in names]


@_without_glyphs()
def _save_png(figure: Figure, path: Path) -> None:
    save_file(path, lambda temporary: figure.savefig(temporary, dpi=_DPI, format="png"))
