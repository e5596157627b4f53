"""Folders and comparisons as tables of text."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..results import Results
from ..summary import Cell
from .claims import CLAIMS
from .compare import LEVEL, Beside, Comparison, Verdict
from .kinds import Claim

_IN_A_SENTENCE = {
    Verdict.CONFIRMED: "confirmed",
    Verdict.OPPOSITE: "contradicted",
    Verdict.OPEN: "undecided, as the seeds differ by too much",
    Verdict.ONE_SEED: "undecided, as one seed is not enough to tell",
}
_ACCURACY = "test accuracy, "  # begins the names of some measures
NEAR = 2.0  # points by which an accuracy may differ from the paper's before the report names it


@dataclass(frozen=True)
class TextTable:
    """A table for any form of the report.

    Args:
        header: names of the columns.
        rows: the lines.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def points(number: float) -> str:
    """A difference with its sign.

    Args:
        number: in points.

    Returns:
        The text.

    Example:
        >>> points(-0.04), points(1.3)
        ('0.0', '+1.3')
    """
    text = f"{number:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def claim_table(comparisons: Iterable[Comparison]) -> TextTable:
    """A line for each claim: where it was tested, and what came of it.

    Args:
        comparisons: of all folders.

    Returns:
        The table.
    """
    tests = _by_claim(comparisons)
    rows = []
    for text in dict.fromkeys(claim.text for claim in CLAIMS):
        alike = [claim for claim in CLAIMS if claim.text == text]
        rows.append([text, alike[0].source, _range(alike), _here(tests.get(text, []))])
    return TextTable(["claim", "source", "paper", "here"], rows)


def comparison_table(comparisons: Iterable[Comparison]) -> TextTable:
    """A line for each test of a claim.

    Args:
        comparisons: of all folders.

    Returns:
        The table, in the order of the claims.
    """
    rows = [
        [
            found.claim.text, f"{found.folder.name}: {found.place}", _theirs(found.claim),
            points(found.difference.mean), _interval(found), str(found.difference.seeds), found.verdict.value,
            _size(found),
        ]
        for tests in _by_claim(comparisons).values()
        for found in tests
    ]  # fmt: skip
    return TextTable(["claim", "where", "paper", "ours", "95% interval", "seeds", "verdict", "size"], rows)


def beside_table(pairs: Iterable[Beside]) -> TextTable:
    """The papers' numbers beside ours.

    Args:
        pairs: of one folder.

    Returns:
        The table.
    """
    rows = [
        [
            pair.run.method, pair.run.regime, pair.what, str(pair.ours),
            str(len(pair.ours.values)), f"{pair.theirs:.1f}", pair.numbers.source,
            "different setting" if pair.elsewhere else points(pair.ours.mean - pair.theirs),
        ]
        for pair in pairs
    ]  # fmt: skip
    return TextTable(["method", "batches", "evaluation", "ours", "seeds", "paper", "source", "ours less paper"], rows)


def measure_table(results: Results) -> TextTable:
    """What was measured besides, a line for each measure and a column for each method and regime.

    Args:
        results: result of each run.

    Returns:
        The table; without rows where nothing was.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for run, result in results.items():
        for name, value in result.measures:
            values.setdefault(name, {}).setdefault(f"{run.method}, {run.regime}", []).append(value)
    columns = list(dict.fromkeys(column for by_column in values.values() for column in by_column))
    rows = [[name, *(_mean(by_column.get(column, [])) for column in columns)] for name, by_column in values.items()]
    return TextTable(["measure", *columns], rows)


def share_table(results: Results, regime: str = "") -> TextTable:
    """What was measured besides, where all of it is shares: a line for each method and regime.

    Args:
        results: result of each run.
        regime: the one to show, whose name the lines then leave out; by default all.

    Returns:
        The table, in percent; without rows where nothing was.
    """
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run, result in results.items():
        for name, value in result.measures:
            if regime in ("", run.regime):
                of_line = values.setdefault((run.regime, run.method), {})
                of_line.setdefault(name.removeprefix(_ACCURACY), []).append(100 * value)
    names = list(dict.fromkeys(name for by_name in values.values() for name in by_name))
    regimes = list(dict.fromkeys(regime for regime, _ in values))
    rows = [
        [method, *([] if regime else [its_regime]),
         *(str(Cell(tuple(by_name[name]))) if name in by_name else "-" for name in names)]
        for (its_regime, method), by_name in sorted(values.items(), key=lambda line: regimes.index(line[0][0]))
    ]  # fmt: skip
    return TextTable(["method", *([] if regime else ["batches"]), *names], rows)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):  # of a network that diverged
        return "not finite"
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def tally(comparisons: Sequence[Comparison]) -> str:
    """How many tests came out how, in words.

    Args:
        comparisons: of all folders.

    Returns:
        A sentence.
    """
    found = Counter(comparison.verdict for comparison in comparisons)
    outcomes = [f"{found[verdict]} {words}" for verdict, words in _IN_A_SENTENCE.items() if verdict in found]
    tested, claims = ({claim.text for claim in some} for some in ((test.claim for test in comparisons), CLAIMS))
    if not tested:
        return f"None of the papers' {len(claims)} claims is tested here."
    number = f"{len(comparisons)} comparison{'s' if len(comparisons) > 1 else ''}"
    return f"{len(tested)} of the papers' {len(claims)} claims are tested here, by {number}: {'; '.join(outcomes)}."


def disagreements(comparisons: Iterable[Comparison], pairs: Iterable[Beside]) -> list[str]:
    """Where we differ from the papers, and by how much.

    Args:
        comparisons: of all folders.
        pairs: of all folders.

    Returns:
        A sentence for each difference on the other side of what the paper says, certain or not, for each of another
        size in the paper's own setting, and for each accuracy far from the paper's there.
    """
    differences = [
        f"{found.claim.text} ({found.claim.source}, {_theirs(found.claim)}): here {points(found.difference.mean)} "
        f"(interval {_interval(found)}, seeds: {found.difference.seeds}) in {found.folder.name}, {found.place}: "
        f"{found.verdict.value}; {_size(found)}"
        for found in comparisons
        if _on_the_other_side(found) or (not found.elsewhere and _outside(found))
    ]
    return differences + [
        f"{pair.numbers.source}, {pair.run.method}, {pair.run.regime}, {pair.what}: "
        f"{pair.ours} instead of {pair.theirs:.1f}, {points(pair.ours.mean - pair.theirs)} points"
        for pair in pairs
        if not pair.elsewhere and abs(pair.ours.mean - pair.theirs) > NEAR
    ]


def _by_claim(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Tests by their claim, in the order of the claims."""
    tests: dict[str, list[Comparison]] = {claim.text: [] for claim in CLAIMS}
    for comparison in comparisons:
        tests[comparison.claim.text].append(comparison)
    return {text: found for text, found in tests.items() if found}


def _here(tests: Sequence[Comparison]) -> str:
    return "; ".join(_phrases(tests)) or "not tested"


def _phrases(tests: Sequence[Comparison]) -> Iterator[str]:
    for verdict in Verdict:
        folders: dict[str, list[str]] = {}
        for found in tests:
            if found.verdict == verdict:
                where = folders.setdefault(found.folder.name, [])
                where.append(f"{found.place} ({points(found.difference.mean)})")
        if folders:
            places = ", ".join(f"{folder} {', '.join(where)}" for folder, where in folders.items())
            yield f"{verdict.value}: {places}"


def _theirs(claim: Claim) -> str:
    if claim.level:
        return "level" if not claim.difference else f"level ({points(claim.difference)})"
    return "no figure" if claim.difference is None else f"{claim.difference:+.2f}".removesuffix("0")


def _range(alike: Sequence[Claim]) -> str:
    smallest, largest = (end(alike, key=lambda claim: claim.difference or 0.0) for end in (min, max))
    return _theirs(smallest) if smallest is largest else f"{_theirs(smallest)} to {_theirs(largest)}"


def _on_the_other_side(found: Comparison) -> bool:
    mean = found.difference.mean
    return found.verdict == Verdict.OPPOSITE or (abs(mean) > LEVEL if found.claim.level else mean < -LEVEL)


def _interval(found: Comparison) -> str:
    difference = found.difference
    if math.isinf(difference.low):
        return "unknown"
    return f"{points(difference.low)} to {points(difference.high)}"


def _outside(found: Comparison) -> bool:
    theirs = found.claim.difference
    return theirs is not None and not found.difference.low <= theirs <= found.difference.high


def _size(found: Comparison) -> str:
    theirs = found.claim.difference
    if found.elsewhere:
        return "different setting"
    if theirs is None:
        return "not told in the paper"
    return f"{points(found.difference.mean - theirs)} to the paper's" + (
        "" if _outside(found) else ", within the spread"
    )
