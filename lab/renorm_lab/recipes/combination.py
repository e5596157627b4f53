"""Groupings, limits and tracking rules, over batch sizes and dependence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..networks.methods import METHODS, MethodName
from ..recipe import SMALL, SUMMERS, TINY, Scales
from ..runs import Run
from .smallbatch import SmallBatch

_CHANNELS = (2, 4)  # that share statistics in the rows of batch-group norm


@dataclass(frozen=True, kw_only=True)
class Combination(SmallBatch):
    """Look for the combination that loses least, between independent and dependent minibatches and over batch sizes.

    Learning rate and steps are those for `reference_size` examples, as in the recipe smallbatch. Example weighing is
    in the columns "on". What each row loses to the best of a column is in the report.

    Args:
        classes_per_batch: classes in a dependent minibatch, drawn at random for each.
        examples_per_class: examples of each of them.
        reference_size: batch size that steps and lr are for.
    """

    name: ClassVar[str] = "combination"
    title: ClassVar[str] = "Combinations over batch sizes and classes"
    claim: ClassVar[str] = "which combination loses least is open"
    source: ClassVar[str] = "beyond both papers"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"batch_sizes": (32,), "methods": ("batch_norm", "batch_group_renorm")},
        "small": SMALL | {"steps": 1_000, "image_size": 16, "augment": True, "classes_per_batch": 16,
                          "examples_per_class": 4},
        "paper": SUMMERS | {"batch_sizes": (128, 32, 8, 2), "reference_size": 128, "classes_per_batch": 4,
                            "examples_per_class": 32},
    }  # fmt: skip

    methods: tuple[MethodName, ...] = (
        "batch_norm", "batch_renorm", "batch_renorm_close", "batch_group_norm", "batch_group_renorm", "group_norm"
    )  # fmt: skip
    batch_sizes: tuple[PositiveInt, ...] = (64, 8, 2)
    classes_per_batch: PositiveInt = 4
    examples_per_class: PositiveInt = 8
    reference_size: PositiveInt = 64
    steps: PositiveInt = 500

    def runs(self, dataset: Dataset) -> list[Run]:
        classes, examples = self.classes_per_batch, self.examples_per_class
        few = {"classes_per_batch": classes, "examples_per_class": examples, "replacement": True}
        regimes: list[tuple[int, dict[str, Any]]] = [
            *((size, {}) for size in self.batch_sizes),
            (classes * examples, few | {"regime": f"{classes} classes x {examples}"}),
        ]
        return [
            self.sized_run(
                dataset, method, self._group(method, size), label=METHODS[method].label + label, size=size, seed=seed,
                **(sampling | change),
            )
            for method in self.methods
            for label, change in self._rows(method).items()
            for size, sampling in regimes
            for seed in self.seed_numbers
            if (method, size) != ("batch_norm", 1)
        ]  # fmt: skip

    def _rows(self, method: MethodName) -> dict[str, dict[str, Any]]:
        """What else the rows of a method differ in; "2 x 4" is 2 examples x 4 channels that share statistics."""
        if method == "batch_renorm":
            return {"": {}, ", tracking total": {"tracking": "total"}}
        if method in ("batch_group_norm", "batch_group_renorm"):
            return {f", {self.group_size} x {channels}": {"channels_per_group": channels} for channels in _CHANNELS}
        return {"": {}}
