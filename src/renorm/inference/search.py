"""Looking for the largest value of a function on [0, 1] with as few evaluations as possible."""

from __future__ import annotations

import math
from collections.abc import Mapping

_STEP, _TOLERANCE = 0.1, 0.01
_GOLDEN = (3 - math.sqrt(5)) / 2


def best_of(known: Mapping[float, float]) -> float:
    """Where the value is largest; of equals the smallest place.

    Args:
        known: value by place, at least one.

    Returns:
        The place.
    """
    return max(sorted(known), key=known.__getitem__)


def next_place(known: Mapping[float, float]) -> float | None:
    """Where to look next: steps until the best lies between two others, then as Brent's method.

    That takes the vertex of the parabola through the three, or else the golden section of the larger gap.

    Args:
        known: value by place, at least one.

    Returns:
        The place, or None where the best is known to within 0.01 on a smooth curve.
    """
    places = sorted(known)
    best = best_of(known)
    at = places.index(best)
    left = places[at - 1] if at > 0 else best
    right = places[at + 1] if at + 1 < len(places) else best
    if best > 0 and (left == best or best - left > 1.5 * _STEP):
        return round(max(0.0, best - _STEP), 4)
    if best < 1 and (right == best or right - best > 1.5 * _STEP):
        return round(min(1.0, best + _STEP), 4)
    following = _between(left, best, right, known)
    return None if following is None else round(following, 4)


def _between(left: float, best: float, right: float, known: Mapping[float, float]) -> float | None:
    vertex = _vertex(left, best, right, known) if left < best < right else None
    if vertex is not None and abs(vertex - best) < _TOLERANCE / 2:
        return None
    if vertex is not None and left + _TOLERANCE / 2 < vertex < right - _TOLERANCE / 2:
        return vertex
    if max(best - left, right - best) <= 2 * _TOLERANCE:
        return None
    return best - _GOLDEN * (best - left) if best - left > right - best else best + _GOLDEN * (right - best)


def _vertex(left: float, best: float, right: float, known: Mapping[float, float]) -> float | None:
    rise = (best - left) * (known[best] - known[right])
    fall = (best - right) * (known[best] - known[left])
    if rise == fall:
        return None
    return best - ((best - left) * rise - (best - right) * fall) / (rise - fall) / 2
