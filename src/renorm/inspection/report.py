"""An inspection, and the ways to look at it: as text, in a notebook, as a picture and as a table in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..files import save_csv
from . import tables
from .plot import draw
from .records import Finding, LayerReport, ModeReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        return tables.as_text(self.layers, self.modes, self.findings)

    def __rich__(self) -> Any:
        return tables.as_rich(self.layers, self.modes, self.findings)

    def _repr_html_(self) -> str:
        return tables.as_html(self.layers, self.modes, self.findings)

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


_QUANTILES = {"r": (5, 50, 95), "d": (5, 50, 95), "d_size": (50, 95)}


def _cells(layer: LayerReport) -> list[tuple[str, object]]:
    cells: list[tuple[str, object]] = []
    for field in fields(layer):
        value = getattr(layer, field.name)
        if field.name in _QUANTILES:
            cells += [(f"{field.name}_{q}", v) for q, v in zip(_QUANTILES[field.name], value, strict=True)]
        else:
            cells.append((field.name, "" if value is None else value))
    return cells
