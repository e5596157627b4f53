"""Rows of the result files, and ratios between contenders on the same cases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import geometric_mean

from csvfiles import Row, Value

_CASE = ("network", "shape", "layout", "dtype", "mode", "variant", "allocator", "threads", "batch", "size",
         "processes")  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """A contender's value over another's, on one case.

    Args:
        value: the quotient.
        row: of the contender above.
    """

    value: float
    row: Row

    def __str__(self) -> str:
        names = ("network", "layout", "variant") if "shape" not in self.row else ("shape", "layout", "variant")
        where = " ".join(str(self.row[name]) for name in names if name in self.row)
        threads = self.row.get("threads", 1)
        return f"{self.value:.2f} at {where}" + (f", {threads} threads" if threads != 1 else "")


def select(rows: Iterable[Row], **wanted: Value) -> list[Row]:
    """The rows with the given values.

    Args:
        rows: all rows.
        **wanted: value by column.

    Returns:
        Those that have all of them.
    """
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def ratios(rows: list[Row], above: str, below: str, column: str = "median_ms") -> list[Ratio]:
    """A contender over another, case by case.

    Args:
        rows: of one direction.
        above: a contender.
        below: the contender it is compared with.
        column: what is compared.

    Returns:
        A ratio for each case that has both.
    """
    denominators = {_case(row): row for row in select(rows, contender=below)}
    return [
        Ratio(float(row[column]) / float(denominators[_case(row)][column]), row)
        for row in select(rows, contender=above)
        if _case(row) in denominators
    ]


def between_threads(rows: list[Row], contender: str) -> list[Ratio]:
    """A contender's least time with two threads over that with one, case by case.

    Args:
        rows: of one direction.
        contender: whose.

    Returns:
        A ratio for each case that was measured with both.
    """
    two, one = (select(rows, contender=contender, threads=threads) for threads in (2, 1))
    singles = {_case(row | {"threads": 2}): row for row in one}
    return [
        Ratio(float(row["least_ms"]) / float(singles[_case(row)]["least_ms"]), row)
        for row in two
        if _case(row) in singles
    ]


def mean(values: Iterable[Ratio]) -> float | None:
    """The geometric mean.

    Args:
        values: ratios.

    Returns:
        Their mean; None if there are none.
    """
    numbers = [ratio.value for ratio in values]
    return geometric_mean(numbers) if numbers else None


def worst(values: Iterable[Ratio]) -> Ratio | None:
    """The largest ratio; None if there are none."""
    return max(values, key=lambda ratio: ratio.value, default=None)


def _case(row: Row) -> tuple[Value | None, ...]:
    return tuple(row.get(name) for name in _CASE)
