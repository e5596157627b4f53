"""Claims against results: which cells of a table a claim is about, and what they say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import product
from pathlib import PurePath

from ..runs import Run
from ..summary import Cell
from .claims import CLAIMS, NUMBERS
from .folders import Folder
from .intervals import Difference, difference
from .kinds import ANY, Claim, Numbers, Setting, Spot

_PAPER_LIMITS = 3.0, 5.0  # r_max, d_max of all that the papers say of batch renorm
LEVEL = 1.0  # points by which two accuracies that are called level may differ


class Verdict(Enum):
    """What results say about a claim."""

    CONFIRMED = "confirmed"
    OPPOSITE = "not confirmed: the opposite"
    OPEN = "not confirmed"
    ONE_SEED = "not certain: one seed"


@dataclass(frozen=True)
class Comparison:
    """A claim and what a run folder says about it.

    Args:
        claim: the claim.
        folder: the folder.
        place: where in the folder's table the two stand.
        difference: of the two, as measured.
        verdict: what follows.
        elsewhere: in which the setting differs from the paper's; empty in the same setting.
    """

    claim: Claim
    folder: Folder
    place: str
    difference: Difference
    verdict: Verdict
    elsewhere: tuple[str, ...]


@dataclass(frozen=True)
class Beside:
    """A paper's number and the same cell of ours.

    Args:
        numbers: where the paper's stands.
        run: one of ours.
        spot: where it stands in the table.
        ours: accuracies of the seeds.
        theirs: the paper's accuracy in percent.
        elsewhere: in which the setting differs from the paper's.
    """

    numbers: Numbers
    run: Run
    spot: Spot
    ours: Cell
    theirs: float
    elsewhere: tuple[str, ...]

    @property
    def what(self) -> str:
        """The measure, or whether the test accuracy is with example weighing."""
        return self.spot.measure or ("weighing on" if self.spot.weighed else "weighing off")


def judge(claim: Claim, found: Difference) -> Verdict:
    """What a difference says about a claim.

    Args:
        claim: first above second, or level with it.
        found: as measured.

    Returns:
        The verdict.
    """
    if found.seeds < 2:
        return Verdict.ONE_SEED
    low, high = (-LEVEL, LEVEL) if claim.level else (0.0, math.inf)
    if claim.level and low <= found.low and found.high <= high:
        return Verdict.CONFIRMED
    if not claim.level and found.low > low:
        return Verdict.CONFIRMED
    return Verdict.OPPOSITE if found.high < low or found.low > high else Verdict.OPEN


def compare(folder: Folder, claims: Iterable[Claim] = CLAIMS) -> list[Comparison]:
    """All that a folder says about claims.

    Args:
        folder: the folder.
        claims: by default the papers'.

    Returns:
        Comparisons, in the order of the claims.
    """
    return [
        _comparison(claim, folder, first, second)
        for claim in claims
        if folder.first.recipe in claim.recipes
        for first, second in _pairs(claim, folder)
    ]


def beside(folder: Folder) -> list[Beside]:
    """The papers' numbers that have a counterpart in a folder.

    Args:
        folder: the folder.

    Returns:
        Pairs, in the order of the folder's table.
    """
    return [
        Beside(numbers, run, spot, Cell(ours), theirs, elsewhere(numbers.setting, run))
        for run in _cells(folder)
        for numbers in NUMBERS
        if run.recipe in numbers.recipes
        for spot, theirs in numbers.accuracies.items()
        if stands_at(run, spot) and (ours := _values(folder, run, spot))
    ]


def elsewhere(setting: Setting, run: Run) -> tuple[str, ...]:
    """In which a run's setting differs from a paper's.

    Args:
        setting: the paper's.
        run: ours.

    Returns:
        A phrase for each difference; none means that accuracies can be compared.
    """
    wanted = {**setting.run, **(setting.few_classes if run.classes_per_batch is not None else {})}
    found = [
        f"{name.replace('_', ' ')} {'not set' if getattr(run, name) is None else getattr(run, name)} (paper: {value})"
        for name, value in wanted.items()
        if _bare_name(getattr(run, name)) != _bare_name(value)
    ]
    if run.steps < setting.least_steps:
        found.append(f"steps {run.steps:,} (paper: {setting.least_steps:,} or more)")
    return tuple(found)


def stands_at(run: Run, spot: Spot, *, any_group: bool = False) -> bool:
    """Whether a run belongs to a spot of a table, weighing apart.

    Args:
        run: the run.
        spot: the spot.
        any_group: whether groups of another size belong to it too, if they are smaller than the minibatch.

    Returns:
        Whether it does.
    """
    whole = run.forward_size or run.batch_size
    group = run.examples_per_group or whole
    same_group = spot.group == ANY or group == (whole if spot.group is None else spot.group)
    if any_group and spot.group is not None:
        same_group = group < whole
    if run.limits and (run.r_max, run.d_max) != _PAPER_LIMITS:
        return False
    return (
        spot.method == run.method.partition(",")[0]
        and (run.classes_per_batch is not None) == spot.few_classes
        and same_group
        and all(getattr(run, name) == value for name, value in spot.fields)
    )


def _cells(folder: Folder) -> list[Run]:
    """One run of each method and regime."""
    return list({(run.method, run.regime): run for run in folder.results}.values())


def _values(folder: Folder, of: Run, spot: Spot) -> tuple[float, ...]:
    """Accuracies of the seeds in percent; none where what the spot asks for was not measured."""
    results = [result for run, result in folder.results.items() if (run.method, run.regime) == (of.method, of.regime)]
    if spot.measure:
        measures = [dict(result.measures) for result in results]
        return tuple(100 * found[spot.measure] for found in measures if spot.measure in found)
    return tuple(100 * (result.test_accuracy_on if spot.weighed else result.test_accuracy_off) for result in results)


def _pairs(claim: Claim, folder: Folder) -> Iterator[tuple[Run, Run]]:
    def those_at(spot: Spot) -> list[Run]:
        runs = [run for run in _cells(folder) if stands_at(run, spot, any_group=claim.any_group)]
        return [run for run in runs if _values(folder, run, spot)]

    for first, second in product(those_at(claim.first), those_at(claim.second)):
        if (claim.across or first.regime == second.regime) and _same_kind(claim, first, second):
            yield first, second


def _same_kind(claim: Claim, first: Run, second: Run) -> bool:
    """Example weighing and measures are of the same row, and not of one whose groups have another size."""
    alike = replace(claim.first, weighed=False, measure="") == replace(claim.second, weighed=False, measure="")
    return first.method == second.method if alike else True


def _comparison(claim: Claim, folder: Folder, first: Run, second: Run) -> Comparison:
    values = [_values(folder, run, spot) for run, spot in ((first, claim.first), (second, claim.second))]
    same_networks = replace(first, seed=0) == replace(second, seed=0) and len(values[0]) == len(values[1])
    found = difference(*values, paired=same_networks)
    differs = tuple(dict.fromkeys(elsewhere(claim.setting, first) + elsewhere(claim.setting, second)))
    return Comparison(claim, folder, _place(first, second), found, judge(claim, found), differs)


def _place(first: Run, second: Run) -> str:
    group = first.method.partition(", ")[2]
    regimes = first.regime if first.regime == second.regime else f"{first.regime} against {second.regime}"
    return f"{regimes}, {group}" if group else regimes


def _bare_name(value: object) -> object:
    """Names however they are written, without the folder or library that they come from."""
    return PurePath(value).name.lower().replace("-", "").replace("_", "") if isinstance(value, str) else value
