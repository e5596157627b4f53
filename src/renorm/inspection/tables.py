"""An inspection as text, in a rich terminal, and in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import Any

from ..markup import bullets, table
from .records import Finding, LayerReport, ModeReport

_LAYER_COLUMNS: tuple[tuple[str, Callable[[LayerReport], str]], ...] = (
    ("layer", lambda layer: _name(layer.name)),
    ("m", lambda layer: f"{layer.elements:.0f}"),
    ("r", lambda layer: f"{layer.r[0]:.2f}-{layer.r[2]:.2f}"),
    ("|d|", lambda layer: f"{layer.d_size[0]:.2f}-{layer.d_size[1]:.2f}"),
    ("clipped", lambda layer: f"{layer.clipped_r:.0%}, {layer.clipped_d:.0%}"),
    ("b/w", lambda layer: f"{layer.between_within:.1f}"),
    ("dead", lambda layer: f"{layer.dead}+{layer.nearly_dead}"),
    ("range", lambda layer: _range(layer)),
)
_LEGEND = (
    "m: elements of a statistics group. r: 5 to 95%. |d|: 50 to 95%. clipped: of r, of d; by it the batch leaks into "
    "training. b/w: how much more means of batches vary than those of independent examples would. dead: dead+nearly "
    "dead channels. range: largest normalized value in training, its bound, at evaluation."
)
_MODE_COLUMNS: tuple[tuple[str, Callable[[ModeReport], str]], ...] = (
    ("score", lambda mode: mode.metric),
    ("evaluation", lambda mode: f"{mode.evaluation.mean:.4f}"),
    ("training mode", lambda mode: f"{mode.training.mean:.4f}"),
    ("shuffled", lambda mode: "" if mode.shuffled is None else f"{mode.shuffled.mean:.4f}"),
    ("training - evaluation (95%)", lambda mode: f"{mode.gap.mean:.4f} ({mode.gap.low:.4f} to {mode.gap.high:.4f})"),
)


def as_text(layers: Sequence[LayerReport], modes: Sequence[ModeReport], findings: Sequence[Finding]) -> str:
    """Plain text, for any terminal and for logs.

    Args:
        layers: reports of the layers.
        modes: reports of the scores.
        findings: what they mean.

    Returns:
        The text.
    """
    tables = ["\n".join(_lines(header, rows)) for header, rows in _tables(layers, modes)]
    return "\n\n".join([*tables, "\n".join(wrap(_LEGEND, 100)), "\n".join(f"- {finding}" for finding in findings)])


def as_html(layers: Sequence[LayerReport], modes: Sequence[ModeReport], findings: Sequence[Finding]) -> str:
    """HTML, for notebooks.

    Args:
        layers: reports of the layers.
        modes: reports of the scores.
        findings: what they mean.

    Returns:
        The HTML.
    """
    concerned = {_name(name) for finding in findings for name in finding.layers}
    tables = (table(header, rows, concerned) for header, rows in _tables(layers, modes))
    return bullets(findings) + "".join(tables) + f"<p>{_LEGEND} Marked: layers that a finding is about.</p>"


def as_rich(layers: Sequence[LayerReport], modes: Sequence[ModeReport], findings: Sequence[Finding]) -> Any:
    """For rich's terminals.

    Args:
        layers: reports of the layers.
        modes: reports of the scores.
        findings: what they mean.

    Returns:
        What rich prints.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = []
    for header, rows in _tables(layers, modes):
        grid = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        grid.add_column(header[0], overflow="fold")
        for name in header[1:]:
            grid.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            grid.add_row(*row)
        shown.append(grid)
    return Group(*shown, Text(_LEGEND, style="dim"), *(f"• {finding}" for finding in findings))


def _name(layer: str) -> str:
    return layer or "(root)"


def _range(layer: LayerReport) -> str:
    return f"{layer.range_training:.1f}, {layer.bound:.1f}, {layer.range_evaluation:.1f}"


def _tables(layers: Sequence[LayerReport], modes: Sequence[ModeReport]) -> list[tuple[list[str], list[list[str]]]]:
    tables = [_table(_MODE_COLUMNS, modes)] if modes else []
    return [*tables, _table(_LAYER_COLUMNS, layers)]


def _table(columns: Any, items: Any) -> tuple[list[str], list[list[str]]]:
    return [name for name, _ in columns], [[cell(item) for _, cell in columns] for item in items]


def _lines(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    aligned = []
    for row in [header, *rows]:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        aligned.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return aligned
