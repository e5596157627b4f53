"""Timing contenders against each other: rounds in which each takes a step, in an order drawn anew every round."""

from __future__ import annotations

import gc
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from csvfiles import Row

# A step times its own parts, as {"forward": ..., "backward": ...}, in seconds.
Step = Callable[[], dict[str, float]]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Budget:
    """How long a case may take.

    Args:
        seconds: rounds go on until they are over.
        least_rounds: as many are taken in any case.
        warmup: rounds before, which do not count.
    """

    seconds: float
    least_rounds: int = 7
    warmup: int = 2


@dataclass
class Samples:
    """What the rounds of a contender gave.

    Args:
        seconds: of each part of the step, one value for each round.
        faults: minor page faults of each round.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    faults: list[int] = field(default_factory=list)

    def add(self, parts: Mapping[str, float], faults: int) -> None:
        """Take in a round."""
        for part, seconds in parts.items():
            self.seconds.setdefault(part, []).append(seconds)
        self.faults.append(faults)

    def row(self, part: str) -> Row:
        """The columns of a part: rounds, median, quartiles and least in milliseconds, page faults of the whole step."""
        lower, median, upper = (round(1e3 * second, 4) for second in statistics.quantiles(self.seconds[part], n=4))
        return {
            "rounds": len(self.faults),
            "median_ms": median,
            "lower_quartile_ms": lower,
            "upper_quartile_ms": upper,
            "least_ms": round(1e3 * min(self.seconds[part]), 4),  # without what the machine does besides
            "minor_faults": statistics.median_low(self.faults),
        }


def interleave(steps: Mapping[Name, Step], budget: Budget) -> dict[Name, Samples]:
    """Time contenders round by round, so that whatever disturbs the machine disturbs all of them.

    Args:
        steps: a step of each contender.
        budget: how long to go on.

    Returns:
        The samples of each contender.
    """
    for _ in range(budget.warmup):
        for step in steps.values():
            step()
    samples = {name: Samples() for name in steps}
    order = random.Random(0)  # a fixed order would leave each contender the same predecessor's caches in all rounds
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget.seconds
        rounds = 0
        while rounds < budget.least_rounds or time.perf_counter() < deadline:
            for name in order.sample(list(steps), len(steps)):
                before = minor_faults()
                parts = steps[name]()
                samples[name].add(parts, minor_faults() - before)
            rounds += 1
    finally:
        gc.enable()
    return samples


def ratio(samples: Samples, below: Samples) -> Row:
    """The columns of a contender's time over another's, round by round: median and quartiles."""
    pairs = zip(samples.seconds["step"], below.seconds["step"], strict=True)
    lower, median, upper = (round(value, 4) for value in statistics.quantiles((a / b for a, b in pairs), n=4))
    return {"ratio": median, "lower_quartile_ratio": lower, "upper_quartile_ratio": upper}


def minor_faults() -> int:
    """Minor page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
