"""Differences of means over seeds, with the uncertainty that the seeds leave."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """How far one mean over seeds lies above another, in points.

    Args:
        mean: first less second.
        low: lower end of the 95% interval; minus infinity with one seed.
        high: its upper end.
        seeds: the fewer of the two.
    """

    mean: float
    low: float
    high: float
    seeds: int


def difference(first: Sequence[float], second: Sequence[float], *, paired: bool) -> Difference:
    """The difference of two means, with Student's interval over seeds.

    Args:
        first: a value for each seed.
        second: the same of what is compared.
        paired: whether values at the same place are of the same trained network; otherwise Welch's interval.

    Returns:
        First less second.

    Source:
        Welch 1947; the degrees of freedom are Welch's and Satterthwaite's.

    Example:
        >>> found = difference([98.0, 97.0, 99.0], [95.0, 96.0, 94.0], paired=False)
        >>> f"{found.mean:.1f}, from {found.low:.1f} to {found.high:.1f}"
        '3.0, from 0.7 to 5.3'
    """
    seeds = min(len(first), len(second))
    mean = statistics.fmean(first) - statistics.fmean(second)
    if seeds < 2:
        return Difference(mean, -math.inf, math.inf, seeds)
    samples = [[a - b for a, b in zip(first, second, strict=True)]] if paired else [first, second]
    squared_errors = [statistics.variance(sample) / len(sample) for sample in samples]
    total = sum(squared_errors)
    if total == 0:
        return Difference(mean, mean, mean, seeds)
    parts = (error**2 / (len(sample) - 1) for error, sample in zip(squared_errors, samples, strict=True))
    half = float(student.ppf((1 + _CONFIDENCE) / 2, total**2 / sum(parts))) * math.sqrt(total)
    return Difference(mean, mean - half, mean + half, seeds)
