"""What the examples share: options, a step of an optimizer, files that nobody sees half of, the look of a method."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from torch import Tensor
from torch.optim import Optimizer

from renorm.files import replace_file as replace_file
from renorm.files import save_csv as save_csv
from renorm.markup import picture_text as picture_text

METHODS = ("renorm", "batch", "none")
LABELS = {"renorm": "batch renorm", "batch": "batch norm", "none": "no norm"}
COLOURS = {"renorm": "#0072B2", "batch": "#D55E00", "none": "#000000"}  # Okabe and Ito's
MARKERS = {"renorm": "o", "batch": "s", "none": "^"}


def options(description: str, steps: int) -> argparse.ArgumentParser:
    """A parser with the options of every example.

    Args:
        description: first line of the help.
        steps: default length of a run.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--norm", nargs="+", choices=METHODS, default=METHODS, help="methods to compare")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=positive, default=steps, help=f"steps of a run (default: {steps})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for table, picture")
    return parser


def positive(text: str) -> int:
    """An argument of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def descend(optimizer: Optimizer, loss: Tensor) -> None:
    """Clear what another loss left in the gradients, and descend."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def draw_curve(axes: Axes, points: Iterable[tuple[int, float]], norm: str, line: str, label: str) -> None:
    """Draw the mean over seeds, and a band from the smallest to the largest.

    Args:
        axes: where to draw.
        points: step and value, of all seeds.
        norm: one of METHODS, for colour and marker.
        line: style of the line; markers of a solid line are filled.
        label: for the legend.
    """
    values: dict[int, list[float]] = {}
    for step, value in points:
        values.setdefault(step, []).append(value)
    axes.plot(
        list(values), [mean(v) for v in values.values()], line, color=COLOURS[norm], linewidth=1.4, label=label,
        marker=MARKERS[norm], markersize=4, markerfacecolor=COLOURS[norm] if line == "-" else "white",
    )  # fmt: skip
    low, high = ([extreme(v) for v in values.values()] for extreme in (min, max))
    axes.fill_between(list(values), low, high, color=COLOURS[norm], alpha=0.12, linewidth=0)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.{digits}f} ± {stdev(values) if len(values) > 1 else 0:.{digits}f}"
