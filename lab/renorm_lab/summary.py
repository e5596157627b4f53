"""Results over seeds: means, standard deviations, and the table of them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.table import Table as RichTable

from renorm.markup import printable

from .results import Results

_UNFINISHED = "-"


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
        off: test score without example weighing, by method and regime; what is not finished is missing.
        on: the same with example weighing.
        score: what is measured, in percent.
        trained: training score in the mode of the training, where the recipe shows it.
    """

    methods: Sequence[str]
    regimes: Sequence[str]
    off: dict[tuple[str, str], Cell]
    on: dict[tuple[str, str], Cell]
    score: str = "accuracy"
    trained: dict[tuple[str, str], Cell] = field(default_factory=dict)

    @property
    def seeds(self) -> str:
        """Seeds behind a cell, such as "1 seed", "3 seeds" or, when some are not finished, "1 to 3 seeds"."""
        counts = {len(cell.values) for cell in self.off.values()}
        if counts == {1}:
            return "1 seed"
        return f"{max(counts)} seeds" if len(counts) == 1 else f"{min(counts)} to {max(counts)} seeds"

    @property
    def caption(self) -> str:
        """What the numbers are."""
        return (
            f"{self._what}. off, on: without and with example weighing (alpha chosen on validation){self._of_training}."
        )

    @property
    def terminal_caption(self) -> str:
        """The same where both stand in one cell."""
        weighed = "with example weighing (alpha chosen on validation), where that is another"
        return f"{self._what}; [weighed]: {weighed}{self._of_training}."

    @property
    def _what(self) -> str:
        seeds = self.seeds if self.seeds == "1 seed" else f"mean ± standard deviation over {self.seeds}"
        return f"Test {self.score} in %, {seeds}"

    @property
    def _of_training(self) -> str:
        return "; trained: training examples, as the network was trained" if self.trained else ""

    @property
    def header(self) -> list[str]:
        """Names of the columns."""
        return ["method", *(f"{regime}, {name}" for regime in self.regimes for name in self._columns)]

    @property
    def rows(self) -> list[list[str]]:
        """A line for each method."""
        return [[method, *self._row(method)] for method in self.methods]

    def _row(self, method: str) -> Iterable[str]:
        for regime in self.regimes:
            for cells in self._columns.values():
                yield str(cells.get((method, regime), _UNFINISHED))

    @property
    def _columns(self) -> dict[str, dict[tuple[str, str], Cell]]:
        """What there is for each regime."""
        trained = {"trained": self.trained} if self.trained else {}
        return trained | {"off": self.off, "on": self.on}


def summarize(results: Results, score: str = "accuracy", *, shows_training: bool = False) -> Summary:
    """Gather the seeds of each method and regime.

    Args:
        results: result of each run, in the order of the table.
        score: what is measured.
        shows_training: whether there is a column of what the network does in training.

    Returns:
        The summary.
    """
    off: dict[tuple[str, str], Cell] = {}
    on: dict[tuple[str, str], Cell] = {}
    trained: dict[tuple[str, str], Cell] = {}
    for run, result in results.items():
        place = run.method, run.regime
        off[place] = _with(off.get(place), result.test_accuracy_off)
        on[place] = _with(on.get(place), result.test_accuracy_on)
        if shows_training:
            measure = "training accuracy" if run.frozen_share else "training-mode training accuracy"
            measured = dict(result.measures)
            if measure in measured:  # a folder's measures.csv may be lost
                trained[place] = _with(trained.get(place), measured[measure])
    methods, regimes = (list(dict.fromkeys(names)) for names in zip(*off, strict=True))
    return Summary(methods, regimes, off, on, score, trained)


def _with(cell: Cell | None, accuracy: float) -> Cell:
    return Cell((*(cell.values if cell else ()), 100 * accuracy))


def markdown_table(summary: Summary) -> str:
    """The table in Markdown.

    Args:
        summary: what to show.

    Returns:
        Lines, ending with the caption.
    """
    return markdown_lines(summary.header, summary.rows) + f"\n{summary.caption}\n"


def markdown_lines(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """Any table in Markdown.

    Args:
        header: names of the columns.
        rows: the lines.
        numbers: whether columns after the first stand to the right.

    Returns:
        Lines.
    """
    ruler = ["---"] + ["---:" if numbers else "---"] * (len(header) - 1)
    lines = (map(markdown_text, header), ruler, *(map(markdown_text, row) for row in rows))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_text(text: str) -> str:
    """Text for a line or a cell of Markdown, where no name is markup.

    Args:
        text: any text.

    Returns:
        The same with backslashes.

    Example:
        >>> print(markdown_text("a|b <i> $x_$"))
        a\\|b \\<i> \\$x\\_\\$
    """
    return re.sub(r"[\\`*\[\]<|$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(text))  # not _ within a word


def terminal_table(summary: Summary, title: str) -> RichTable:
    """The table for a terminal of 80 columns: what a method does in a regime stands in one cell.

    Args:
        summary: what to show.
        title: stands above it.

    Returns:
        A table for `terminal.console`.
    """
    what = f"{'trained / ' * bool(summary.trained)}test [weighed]"
    table = RichTable(title=printable(title), caption=summary.terminal_caption)
    table.add_column("method", min_width=len("batch-group"))
    for regime in summary.regimes:
        table.add_column(f"{printable(regime)}\n{what}", justify="right")
    for method in summary.methods:
        table.add_row(printable(method), *(_cell(summary, (method, regime)) for regime in summary.regimes))
    return table


def _cell(summary: Summary, place: tuple[str, str]) -> str:
    off, on, trained = (cells.get(place) for cells in (summary.off, summary.on, summary.trained))
    if off is None or on is None:
        return _UNFINISHED
    before = f"{trained.mean:.0f} / " if trained else ""
    weighed = f" [{on.mean:.1f}]" if f"{on.mean:.1f}" != f"{off.mean:.1f}" else ""
    return before + str(off).replace("± ", "±") + weighed
