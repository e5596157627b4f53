"""A picture of an inspection."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..markup import picture_text
from .records import LayerReport, ModeReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _BLACK = "#0072B2", "#E69F00", "#009E73", "#000000"  # Okabe and Ito's
_ROW = 0.22  # inches of a layer
_MOST_HEIGHT = 60.0


def draw(layers: Sequence[LayerReport], modes: Sequence[ModeReport]) -> Figure:
    """Draw scores in each mode, and for every layer r, d and the ranges.

    Args:
        layers: reports of the layers; those that no batch reached are left out.
        modes: reports of the scores.

    Returns:
        The figure.

    Raises:
        ValueError: no batch reached a norm layer.
    """
    from matplotlib.figure import Figure

    reached = [layer for layer in layers if layer.batches]
    if not reached:
        raise ValueError(
            f"inspection has {len(layers)} norm layers, but no batch reached one, so there is nothing to "
            "draw: inspect the model on batches that it calls them with"
        )
    height = min(_MOST_HEIGHT, 2.2 + _ROW * max(len(reached), 6))
    above = 2.2 if modes else 0.0
    figure = Figure(figsize=(11, height + above), layout="constrained")
    figure.suptitle("Norm layers in training and at evaluation")
    rows = figure.subfigures(2 if above else 1, 1, height_ratios=[above, height] if above else None, squeeze=False)
    if above:
        for mode, axes in zip(modes, rows[0, 0].subplots(1, len(modes), squeeze=False)[0], strict=True):
            _scores(axes, mode)
    panels = rows[-1, 0].subplots(1, 3, sharey=True)
    places = list(range(len(reached)))
    _correction(panels[0], reached, places, "r")
    _correction(panels[1], reached, places, "d")
    _ranges(panels[2], reached, places)
    panels[0].set_yticks(places, [picture_text(layer.name or "(root)") for layer in reached], fontsize=7)
    panels[0].set_ylim(len(reached) - 0.4, -0.6)
    for axes in panels:
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.55 / height * 2), fontsize=8, frameon=False)
    return figure


def _scores(axes: Axes, mode: ModeReport) -> None:
    rows = [("evaluation", mode.evaluation, _BLUE), ("training mode", mode.training, _ORANGE)]
    if mode.shuffled is not None:
        rows.append(("training mode, shuffled", mode.shuffled, _GREEN))
    for place, (_, interval, colour) in enumerate(rows):
        low, high = interval.mean - interval.low, interval.high - interval.mean
        axes.errorbar(interval.mean, place, xerr=[[low], [high]], fmt="o", color=colour, capsize=3)
        axes.annotate(f"{interval.mean:.4g}", (interval.mean, place), (0, 5), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.8)
    axes.set_title(f"{picture_text(mode.metric.replace('_', '-'))}, with 95% interval", fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def _correction(axes: Axes, layers: list[LayerReport], places: list[int], name: str) -> None:
    low, middle, high = zip(*(getattr(layer, name) for layer in layers), strict=True)
    axes.hlines(places, low, high, color=_BLUE, linewidth=2.5, label="5 to 95%")
    axes.plot(middle, places, "o", color=_BLACK, markersize=3.5, label="median")
    axes.axvline(1 if name == "r" else 0, color="#666666", linewidth=0.8)
    if name == "r":
        axes.set_xscale("log", base=2)
        # so that 0.5, 1 and 2 have ticks
        axes.set_xlim(min([0.45, *_scaled(0.9, low)]), max([2.2, *_scaled(1.1, high)]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(title="r", xlabel="standard deviation of a group\nover the running one")
    else:
        axes.set(title="d", xlabel="mean of a group less the running one,\nin running standard deviations")


def _ranges(axes: Axes, layers: list[LayerReport], places: list[int]) -> None:
    axes.plot([layer.bound for layer in layers], places, "|", color=_BLACK, markersize=9, markeredgewidth=1.5,
              label="bound in training")  # fmt: skip
    axes.plot([layer.range_training for layer in layers], places, "o", color=_ORANGE, markersize=4, label="training")
    axes.plot([layer.range_evaluation for layer in layers], places, "D", color=_BLUE, markersize=4,
              markerfacecolor="white", label="evaluation")  # fmt: skip
    axes.set_xscale("log")
    ends = [end for layer in layers for end in (layer.bound, layer.range_training, layer.range_evaluation)]
    axes.set_xlim(min([0.9, *_scaled(0.8, ends)]), max([11.0, *_scaled(1.2, ends)]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set(title="range", xlabel="largest size of a normalized value")


def _scaled(factor: float, ends: Iterable[float]) -> list[float]:
    """Ends of a logarithmic axis with a margin, of the numbers that have a place on it."""
    return [factor * end for end in ends if 0 < end < math.inf]
