"""What weighing found: the curve, what was set, and whether it is more than noise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from ..files import save_csv
from ..markup import picture_text, table
from .scores import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """The score at an example weight.

    Args:
        alpha: the example weight, of all layers.
        score: with its uncertainty.
        examples: how many it is over.
    """

    alpha: float
    score: Interval
    examples: int


@dataclass(frozen=True)
class Weighing:
    """What `weigh` found; print it.

    Args:
        metric: name of the score.
        alphas: the example weight that each layer has now, by the layer's name.
        best: the one example weight for all layers with the best score, taken or not.
        before: the score of the model as it was.
        gain: how much better what was found is, on the same examples.
        curve: points on all examples, by alpha.
        grid: points on a part of the examples, by alpha.
        passes: evaluations of all examples that this took.
    """

    metric: str
    alphas: Mapping[str, float]
    best: float
    before: Interval
    gain: Interval
    curve: tuple[Point, ...]
    grid: tuple[Point, ...]
    passes: float

    @property
    def alpha(self) -> float | None:
        """The example weight of all layers, None where they have different ones."""
        return next(iter(self.alphas.values())) if len(set(self.alphas.values())) == 1 else None

    @property
    def is_noise(self) -> bool:
        """Whether the gain may be none, with 95% confidence; the model is then as it was."""
        return not self.gain.low > 0

    def __str__(self) -> str:
        rows = [f"{p.alpha:14.3f}  {p.score.mean:9.4f}  [{p.score.low:.4f}, {p.score.high:.4f}]" for p in self.curve]
        own = [f"{alpha:6.3f}  {name}" for name, alpha in self._own()]
        verdict = self._verdict() + (":" if own else "")
        return "\n".join([f"example_weight  {self.metric}, {self.curve[0].examples} examples", *rows, verdict, *own])

    def _repr_html_(self) -> str:
        header = ["example_weight", f"{self.metric}, {self.curve[0].examples} examples", "95%"]
        rows = [
            [f"{p.alpha:.3f}", f"{p.score.mean:.4f}", f"{p.score.low:.4f} to {p.score.high:.4f}"] for p in self.curve
        ]
        own = [[name, f"{alpha:.3f}"] for name, alpha in self._own()]
        layers = table(["layer", "example_weight"], own) if own else ""
        return f"<p>{escape(self._verdict())}</p>{table(header, rows)}{layers}"

    def _verdict(self) -> str:
        gain = f"gains {self.gain.mean:.4f} (95%: {self.gain.low:.4f} to {self.gain.high:.4f})"
        now = "example weights of their own" if self.alpha is None else f"example_weight = {self.alpha:.3f}"
        if not self.is_noise:
            return f"{now} {gain}"
        if self.gain.mean <= 0:
            return f"nothing is better than the model as it was ({now})"
        return f"the model stays as it was ({now}): the best that was found {gain}, within noise"

    def _own(self) -> list[tuple[str, float]]:
        """Example weights that were set, by layer, where they are different ones."""
        return [] if self.is_noise or self.alpha is not None else list(self.alphas.items())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the points as a table: alpha, the score, its interval, examples, and whether those are all.

        Args:
            path: file to write.
        """
        header = ["alpha", self.metric, "low", "high", "examples", "data"]
        rows = [
            (point.alpha, point.score.mean, point.score.low, point.score.high, point.examples, data)
            for points, data in ((self.curve, "all"), (self.grid, "part"))
            for point in points
        ]
        save_csv(path, header, rows)

    def plot(self) -> Figure:
        """Draw the score over the example weight; needs matplotlib.

        Returns:
            The figure; `savefig` writes it.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        curve = self.curve
        alphas, means = [point.alpha for point in curve], [point.score.mean for point in curve]
        if self.grid and self.grid[0].examples < curve[0].examples:
            label = f"a part: {self.grid[0].examples} examples"
            grid = [point.alpha for point in self.grid], [point.score.mean for point in self.grid]
            axes.plot(*grid, "s", color="#999999", markerfacecolor="white", label=label)
        low, high = [point.score.low for point in curve], [point.score.high for point in curve]
        axes.fill_between(alphas, low, high, color="#0072B2", alpha=0.15, linewidth=0, label="95% interval")
        axes.plot(alphas, means, "o-", color="#0072B2", label=f"all {curve[0].examples} examples")
        axes.axvline(self.best, color="#D55E00", linestyle=":", label=f"best: {self.best:g}")
        metric = picture_text(self.metric.replace("_", "-"))
        axes.set(title="Evaluation by example weight", xlabel="example weight (alpha)", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure
