"""An inspection, and the ways to look at it: as text, in a notebook, as a picture and as a table in a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from ..files import save_csv
from ..markup import bullets, table
from .plot import draw
from .records import Finding, LayerReport, ModeReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
_QUANTILES = {"r": (5, 50, 95), "d": (5, 50, 95), "d_size": (50, 95)}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found: print it, look at it in a notebook, `plot` it or write it `to_csv`.

    Args:
        layers: a report for each norm layer, in the order of the model.
        modes: a report for each score.
        findings: in plain language: of the model, then of its layers, each about the worst layer.
    """

    layers: tuple[LayerReport, ...]
    modes: tuple[ModeReport, ...]
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        tables = ["\n".join(_lines(header, rows)) for header, rows in self._tables()]
        findings = "\n".join(f"- {finding}" for finding in self.findings)
        return "\n\n".join([*tables, "\n".join(wrap(_LEGEND, 100)), findings])

    def __rich__(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        shown: list[Any] = []
        for header, rows in self._tables():
            grid = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
            grid.add_column(Text(header[0]), overflow="fold")
            for name in header[1:]:
                grid.add_column(Text(name), justify="right", no_wrap=True)
            for row in rows:
                grid.add_row(*map(Text, row))  # else rich took brackets in a layer's name for markup
            shown.append(grid)
        return Group(*shown, Text(_LEGEND, style="dim"), *(Text(f"• {finding}") for finding in self.findings))

    def _repr_html_(self) -> str:
        concerned = {_name(name) for finding in self.findings for name in finding.layers}
        tables = (table(header, rows, concerned) for header, rows in self._tables())
        return bullets(self.findings) + "".join(tables) + f"<p>{_LEGEND} Marked: layers that a finding is about.</p>"

    def plot(self) -> Figure:
        """Draw r, d and the ranges of every layer, and the scores in both modes; needs matplotlib.

        Returns:
            The figure; `savefig` writes it.

        Raises:
            ValueError: no batch reached a norm layer.
        """
        return draw(self.layers, self.modes)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the layers' reports as a table, a row for each.

        Args:
            path: file to write.
        """
        header = [name for name, _ in _cells(self.layers[0])]
        save_csv(path, header, ([cell for _, cell in _cells(layer)] for layer in self.layers))

    def _tables(self) -> list[tuple[list[str], list[list[str]]]]:
        tables = [_table(_MODE_COLUMNS, self.modes)] if self.modes else []
        return [*tables, _table(_LAYER_COLUMNS, self.layers)]


def _name(layer: str) -> str:
    return layer or "(root)"


def _range(layer: LayerReport) -> str:
    return f"{layer.range_training:.1f}, {layer.bound:.1f}, {layer.range_evaluation:.1f}"


def _table(columns: Any, items: Any) -> tuple[list[str], list[list[str]]]:
    return [name for name, _ in columns], [[cell(item) for _, cell in columns] for item in items]


def _lines(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    aligned = []
    for row in [header, *rows]:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        aligned.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return aligned


def _cells(layer: LayerReport) -> list[tuple[str, object]]:
    cells: list[tuple[str, object]] = []
    for field in fields(layer):
        value = getattr(layer, field.name)
        if field.name in _QUANTILES:
            cells += [(f"{field.name}_{q}", v) for q, v in zip(_QUANTILES[field.name], value, strict=True)]
        else:
            cells.append((field.name, "" if value is None else value))
    return cells
