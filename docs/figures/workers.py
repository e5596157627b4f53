"""Draws the first picture of the project, from committed results: python docs/figures/workers.py"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from renorm_lab.report.folders import read_folder

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
DATA = {"workers-digits": "digits", "workers-fashion": "Fashion-MNIST"}
REGIME = "1 class each"
ROWS = {  # label: method, column, whether weighed
    "batch norm": ("batch norm", REGIME, False),
    "the same network,\nweighed": ("batch norm", REGIME, True),
    "batch norm, frozen\nfor the last half": ("batch norm, frozen for the last 50%", REGIME, False),
    "batch renorm\nwithout limits": ("batch renorm, no limits", REGIME, False),
    "group norm": ("group norm", REGIME, False),
    "batch norm,\nsynchronized": ("batch norm", "synchronized", False),
}
TRAINED, TESTED, FAILED = "#999999", "#0072B2", "#D55E00"  # of Okabe and Ito


def draw_data(axes: Axes, folder: str) -> None:
    """Accuracy at evaluation as bars, in training as strokes.

    Args:
        axes: where to draw.
        folder: the results' name.
    """
    summary = read_folder(RESULTS / folder).summary
    for place, (method, regime, weighed) in enumerate(ROWS.values()):
        tested = (summary.on if weighed else summary.off)[method, regime].mean
        trained = summary.trained[method, regime].mean
        axes.barh(place, tested, 0.66, color=TESTED if place else FAILED)
        axes.plot([trained, trained], [place - 0.42, place + 0.42], color=TRAINED, linewidth=3, solid_capstyle="butt")
        axes.text(2, place, f"{tested:.0f}", va="center", color="white", fontweight="bold")
    axes.set(title=DATA[folder], xlim=(0, 102), xlabel="accuracy in %")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params("y", length=0)


def draw() -> Figure:
    """Draw the picture.

    Returns:
        The figure.
    """
    figure = Figure((9, 4.2), layout="constrained")
    panels = figure.subplots(1, len(DATA), sharey=True)
    for axes, folder in zip(panels, DATA, strict=True):
        draw_data(axes, folder)
    panels[0].set_yticks(range(len(ROWS)), list(ROWS))
    panels[0].invert_yaxis()
    figure.suptitle("Every worker holds one class, gradients are averaged")
    panels[1].plot([], [], color=TRAINED, linewidth=3, label="in training")
    panels[1].barh(0, 0, color=TESTED, label="at evaluation, on new examples")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "workers.png", dpi=110)
