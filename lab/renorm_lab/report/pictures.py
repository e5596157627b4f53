"""Pictures inside a page, each with its content in words."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass

from ..results import Results
from ..summary import Summary
from .plots import as_svg, curves_of, draw_bars, draw_curves


@dataclass(frozen=True)
class Picture:
    """A picture that needs no file beside the page.

    Args:
        source: of an `img` element.
        alt: what it shows, in words.
    """

    source: str
    alt: str


def pictures(results: Results, summary: Summary) -> list[Picture]:
    """Bars and curves, a picture for each regime, narrow enough for a telephone.

    Args:
        results: result of each run.
        summary: of the same.

    Returns:
        Pictures, in the order of the regimes.
    """
    made = []
    for regime in summary.regimes:
        made.append(Picture(_embedded(as_svg(draw_bars(summary, [regime], ""))), _bars_in_words(summary, regime)))
        if any(run.regime == regime and result.curve for run, result in results.items()):
            drawn = draw_curves(results, summary, [regime], "")
            made.append(Picture(_embedded(as_svg(drawn)), _curves_in_words(results, summary, regime)))
    return made


def _embedded(svg: str) -> str:
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"


def _bars_in_words(summary: Summary, regime: str) -> str:
    bars = [
        f"{method} {summary.off[method, regime]} off, {summary.on[method, regime]} on"
        for method in summary.methods
        if (method, regime) in summary.off
    ]
    return f"Bars of the test {summary.score} in %, {regime}, without and with example weighing: {'; '.join(bars)}."


def _curves_in_words(results: Results, summary: Summary, regime: str) -> str:
    ends = []
    for method in summary.methods:
        curves = curves_of(results, method, regime)
        if not curves:
            continue
        middle = len(curves[0]) // 2
        half, end = (
            100 * sum(curve[at].validation_accuracy for curve in curves) / len(curves) for at in (middle, -1)
        )  # fmt: skip
        ends.append(f"{method} {half:.1f} halfway, {end:.1f} at the end")
    return f"Curves of the validation {summary.score} in % over the training, {regime}: {'; '.join(ends)}."
