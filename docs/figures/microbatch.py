"""Draws the first page's picture: python docs/figures/microbatch.py"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "results" / "microbatch-digits" / "results.csv"
# Okabe and Ito's colours, which colour-blind readers tell apart, and markers for those who print.
STYLES = {
    "batch-group norm": ("#009E73", "D", 1.03),
    "batch renorm": ("#0072B2", "o", 1.0),
    "batch norm": ("#000000", "s", 0.97),
}


def draw() -> Figure:
    """Test accuracy over the number of examples that share statistics, a line for each method.

    Returns:
        The figure.
    """
    with RESULTS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sizes = sorted({int(row["examples_per_group"]) for row in rows}, reverse=True)
    seeds = len({row["seed"] for row in rows})
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, (colour, marker, beside) in STYLES.items():
        accuracies = [
            [
                100 * float(row["test_accuracy_off"])
                for row in rows
                if row["method"] == method and row["regime"] == f"n = {size}"
            ]
            for size in sizes
        ]
        places, means = [size * beside for size in sizes], [mean(values) for values in accuracies]
        spreads = [stdev(values) for values in accuracies]
        axes.errorbar(places, means, spreads, color=colour, marker=marker, capsize=3, label=method)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.invert_xaxis()
    axes.set(
        title="A perceptron on digits, one gradient of 32 examples",
        xlabel="examples that a norm layer sees at once",
        ylabel="test accuracy in %",
        ylim=(35, 102),
    )
    axes.grid(alpha=0.3)
    axes.legend(title=f"mean and standard deviation of {seeds} seeds", loc="lower left")
    return figure


if __name__ == "__main__":
    draw().savefig(DOCS / "figures" / "microbatch.png", dpi=150)
