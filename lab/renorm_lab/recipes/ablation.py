"""Batch renorm's own settings, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..networks.methods import METHODS, MethodName
from ..recipe import IOFFE, SMALL, TINY, Recipe, Scales
from ..runs import Run

# Label, and what differs from the method's own setting.
_CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "momentum 0.1": {"momentum": 0.1},
    "momentum 0.01": {"momentum": 0.01},
    "momentum 0.002": {"momentum": 0.002},
    "no plain phase": {"plain_phase": 0.0},
    "plain phase x 5": {"plain_phase": 5.0},
    "no ramps": {"ramps": 0.0},
    "ramps x 3": {"ramps": 3.0},
    "r_max 1.5": {"r_max": 1.5},
    "r_max 10": {"r_max": 10.0},
    "d_max 0.5": {"d_max": 0.5},
    "d_max 20": {"d_max": 20.0},
    "tracking var": {"tracking": "var"},
    "tracking total": {"tracking": "total"},
    "no layer clipped": {"unclipped": "all"},
    "unclipped where a norm follows": {"unclipped": "followed"},
    "unclipped where none follows": {"unclipped": "exposed"},
}


@dataclass(frozen=True, kw_only=True)
class Ablation(Recipe):
    """Change one setting of batch renorm at a time, on independent minibatches and on minibatches of few classes.

    Args:
        classes_per_batch: classes in a dependent minibatch, drawn at random for each.
        examples_per_class: examples of each of them; the independent minibatches have as many examples in all.
        num_changes: rows of the table: how many of the changes to try, from the first, which is none; by default all.
    """

    name: ClassVar[str] = "ablation"
    title: ClassVar[str] = "Settings of batch renorm"
    claim: ClassVar[str] = "slow ramps of r_max matter, clipping matters less before another norm; the rest is open"
    source: ClassVar[str] = "Ioffe 2017, 4 and 5"
    scales: ClassVar[Scales] = {
        "tiny": TINY,
        "small": SMALL | {"seeds": 1, "classes_per_batch": 16, "examples_per_class": 2},
        "paper": IOFFE | {"classes_per_batch": 16, "examples_per_class": 2},
    }

    methods: tuple[MethodName, ...] = ("batch_renorm",)
    classes_per_batch: PositiveInt = 2
    examples_per_class: PositiveInt = 16
    num_changes: PositiveInt | None = None

    def runs(self, dataset: Dataset) -> list[Run]:
        classes, examples = self.classes_per_batch, self.examples_per_class
        sampling = {"classes_per_batch": classes, "examples_per_class": examples}
        regimes: list[tuple[str, dict[str, int]]] = [("i.i.d.", {}), (f"{classes} classes x {examples}", sampling)]
        return [
            self.make_run(
                dataset, method, None, regime=regime, batch_size=classes * examples, seed=seed,
                label=f"{METHODS[method].label}, {label}", **(sampling | change),
            )
            for method in self.methods
            for label, change in list(_CHANGES.items())[: self.num_changes]
            for regime, sampling in regimes
            for seed in self.seed_numbers
        ]  # fmt: skip
