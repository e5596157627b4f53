"""Results over seeds: means, standard deviations, and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable

from .store import Results


@dataclass(frozen=True)
class Cell:
    """Test accuracies of the seeds of one method in one regime.

    Args:
        values: accuracies in percent, one for each seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds, in percent."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over seeds, in points; 0 for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.deviation:.1f}" if len(self.values) > 1 else f"{self.mean:.1f}"


@dataclass(frozen=True)
class Summary:
    """The table of a recipe: a row for each method, and for each regime a column without and one with weighing.

    Args:
        methods: rows.
        regimes: pairs of columns.
        off: test accuracy without example weighing, by method and regime.
        on: the same with example weighing.
    """

    methods: Sequence[str]
    regimes: Sequence[str]
    off: dict[tuple[str, str], Cell]
    on: dict[tuple[str, str], Cell]

    @property
    def seeds(self) -> int:
        """Seeds behind each cell."""
        return len(next(iter(self.off.values())).values)

    @property
    def caption(self) -> str:
        """What the numbers are."""
        seeds = "1 seed" if self.seeds == 1 else f"mean ± standard deviation over {self.seeds} seeds"
        return f"Test accuracy in %, {seeds}. off, on: without and with example weighing (alpha chosen on validation)."


def summarize(results: Results) -> Summary:
    """Gather the seeds of each method and regime.

    Args:
        results: result of each run, in the order of the table.

    Returns:
        The summary.
    """
    off: dict[tuple[str, str], Cell] = {}
    on: dict[tuple[str, str], Cell] = {}
    for run, result in results.items():
        place = run.method, run.regime
        off[place] = _with(off.get(place), result.test_accuracy_off)
        on[place] = _with(on.get(place), result.test_accuracy_on)
    methods, regimes = (list(dict.fromkeys(names)) for names in zip(*off, strict=True))
    return Summary(methods, regimes, off, on)


def _with(cell: Cell | None, accuracy: float) -> Cell:
    return Cell((*(cell.values if cell else ()), 100 * accuracy))


def markdown_table(summary: Summary) -> str:
    """The table in Markdown.

    Args:
        summary: what to show.

    Returns:
        Lines, ending with the caption.
    """
    header = ["method", *_headings(summary)]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *_rows(summary)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{summary.caption}\n"


def terminal_table(summary: Summary, title: str) -> RichTable:
    """The table for a terminal.

    Args:
        summary: what to show.
        title: stands above it.

    Returns:
        A table that rich prints.
    """
    table = RichTable(title=title, caption=summary.caption)
    table.add_column("method", min_width=len("batch-group"))
    for heading in _headings(summary):
        table.add_column(heading.replace(", ", "\n"), justify="right")
    for row in _rows(summary):
        table.add_row(*(cell.replace("± ", "±") for cell in row))  # in a narrow terminal lines break before the sign
    return table


def _headings(summary: Summary) -> Iterable[str]:
    return (f"{regime}, {switch}" for regime in summary.regimes for switch in ("off", "on"))


def _rows(summary: Summary) -> Iterable[list[str]]:
    for method in summary.methods:
        places = [(method, regime) for regime in summary.regimes]
        yield [method, *(str(cells[place]) for place in places for cells in (summary.off, summary.on))]
