"""The plots of the documentation, from the rows of the result files."""

from __future__ import annotations

from collections import defaultdict
from math import log2
from pathlib import Path
from statistics import geometric_mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

import contenders as c
from csvfiles import Row, replace_file
from ratios import ratios, select
from shapes import LAYOUTS

# Okabe and Ito's colours, which colour-blind readers tell apart, and markers for those who print.
_STYLES = {
    c.PLAIN: ("#D55E00", "v"),
    c.BATCH_NORM: ("#000000", "s"),
    c.GROUP_NORM: ("#56B4E9", "^"),
    c.OURS: ("#0072B2", "o"),
    c.OURS_FUSED: ("#009E73", "D"),
}
_DPI = 150


def plot_copies(path: Path, layers: list[Row]) -> None:
    """Draw the time of each layer in copies of its input, over the input's size, beside the fewest that it needs.

    Args:
        path: PNG file to write.
        layers: rows of layers.csv.
    """
    rows = select(layers, allocator="kept", threads=1, mode="train", variant="norm")
    # Forward reads x and writes y: a copy. Backward reads x and dy and writes dx: one and a half.
    panels = {"forward": 1.0, "backward": 1.5}
    figure = Figure(figsize=(9.5, 7.5), layout="constrained")
    grid = figure.subplots(2, len(LAYOUTS), sharex=True, sharey="row")
    for (direction, bound), line in zip(panels.items(), grid, strict=True):
        for layout, axes in zip(LAYOUTS, line, strict=True):
            _draw_copies(axes, select(rows, layout=layout), direction)
            axes.axhline(bound, color="grey", linestyle="--", linewidth=1.2, label="each byte moved once")
            axes.set_title(f"{direction}, {layout}", fontsize=10)
        line[0].set_ylabel("time in copies of the input")
    for axes in grid[-1]:
        axes.set_xlabel("size of the input in MB")
    _save(figure, grid[0][0], path)


def _draw_copies(axes: Axes, rows: list[Row], direction: str) -> None:
    copies = {row["shape"]: float(row["median_ms"]) for row in select(rows, contender=c.COPY)}
    for name in (c.PLAIN, c.BATCH_NORM, c.GROUP_NORM, c.OURS):
        colour, marker = _STYLES[name]
        points = [
            (float(row["megabytes"]), float(row["median_ms"]) / copies[row["shape"]])
            for row in select(rows, contender=name, direction=direction)
        ]
        sizes, copies_taken = zip(*points, strict=True)
        axes.scatter(sizes, copies_taken, s=9, color=colour, marker=marker, alpha=0.35, linewidth=0)
        axes.plot(*_trend(points), color=colour, marker=marker, markersize=4, linewidth=1.5, label=name)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks((1, 2, 5, 10, 20, 50), ("1", "2", "5", "10", "20", "50"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _trend(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Geometric means of both coordinates, over sizes within a factor of four."""
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for size, value in points:
        bins[round(log2(size) / 2)].append((size, value))
    centres = [tuple(map(geometric_mean, zip(*bins[index], strict=True))) for index in sorted(bins)]
    return [size for size, _ in centres], [value for _, value in centres]


def plot_models(path: Path, models: list[Row]) -> None:
    """Draw the speed of each network's training in multiples of its nn.BatchNorm2d version.

    Args:
        path: PNG file to write.
        models: rows of models.csv.
    """
    rows = select(models, allocator="kept", threads=1)
    networks = list(dict.fromkeys(str(row["network"]) for row in rows))
    contenders = (c.PLAIN, c.OURS, c.OURS_FUSED)
    figure = Figure(figsize=(8, 1.6 + 0.65 * len(networks)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(contenders)
    for index, name in enumerate(contenders):
        speeds = [
            ratios(select(rows, network=network), name, c.BATCH_NORM, "images_per_second")[0].value
            for network in networks
        ]
        places = np.arange(len(networks)) + (index - (len(contenders) - 1) / 2) * height
        axes.barh(places, speeds, height, color=_STYLES[name][0], label=name)
        for place, speed in zip(places, speeds, strict=True):
            axes.text(speed + 0.01, place, f"{speed:.2f}", va="center", fontsize=8, zorder=3,
                      bbox={"color": "white", "pad": 0.5})  # fmt: skip
    axes.axvline(1, color="black", linewidth=1, label=c.BATCH_NORM)
    axes.set_yticks(np.arange(len(networks)), networks)
    axes.invert_yaxis()
    axes.set_xlabel("images per second over those of the nn.BatchNorm2d network")
    axes.margins(x=0.08)
    _save(figure, axes, path)


def _save(figure: Figure, legend_of: Axes, path: Path) -> None:
    handles, labels = legend_of.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=_DPI, format="png"))
