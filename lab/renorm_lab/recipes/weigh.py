"""The example weight of trained models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..networks.methods import MethodName, rows
from ..recipe import SMALL, SUMMERS, TINY, Recipe, Scales
from ..runs import Run


@dataclass(frozen=True, kw_only=True)
class Weigh(Recipe):
    """Train, then look for the example weight at evaluation, for accuracy and for cross-entropy.

    Measures the curves over the example weight on the test part, and what `renorm.weigh` chooses on the validation
    part. Group norm is evaluated by the example alone (alpha = 1) where it is "off".

    Args:
        batch_size: examples in a minibatch.
        ghost_sizes: examples that share statistics in ghost batch norm, one row of the table each.
        group_size: examples that share statistics in batch-group norm.
    """

    name: ClassVar[str] = "weigh"
    title: ClassVar[str] = "Example weighing on trained models"
    claim: ClassVar[str] = "gains up to 0.6 points without training, for group norm too; best alphas differ by metric"
    source: ClassVar[str] = "Summers & Dinneen 2020, 3.1 and appendix D"
    scales: ClassVar[Scales] = {"tiny": TINY | {"batch_size": 32}, "small": SMALL, "paper": SUMMERS}

    methods: tuple[MethodName, ...] = ("batch_norm", "ghost_batch_norm", "group_norm")
    batch_size: PositiveInt = 128
    ghost_sizes: tuple[PositiveInt, ...] = (16,)
    group_size: PositiveInt = 2

    def runs(self, dataset: Dataset) -> list[Run]:
        return [
            self.make_run(
                dataset, method, size, label=label, regime="i.i.d.", batch_size=self.batch_size, seed=seed,
                measures="weighing",
            )
            for method in self.methods
            for label, size in rows(method, self.ghost_sizes, self.group_size)
            for seed in self.seed_numbers
        ]  # fmt: skip
