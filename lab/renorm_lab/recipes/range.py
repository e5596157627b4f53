"""How far the outputs of normalization reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..networks.methods import METHODS, MethodName
from ..recipe import SMALL, SUMMERS, TINY, Recipe, Scales
from ..runs import Run


@dataclass(frozen=True, kw_only=True)
class Range(Recipe):
    """Train with groups of ever fewer examples, and compare the last layer's outputs with their bound sqrt(m - 1).

    Args:
        batch_size: examples in a minibatch.
        group_sizes: examples that share statistics, one column of the table each.
    """

    name: ClassVar[str] = "range"
    title: ClassVar[str] = "Output ranges in training and at evaluation"
    claim: ClassVar[str] = "outputs are bounded in training, nearly tightly for small groups, but not at evaluation"
    source: ClassVar[str] = "Summers & Dinneen 2020, equation 2, appendices A and B"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"group_sizes": (32, 2)},
        "small": SMALL | {"steps": 2_000},
        "paper": SUMMERS | {"data": "cifar10"},
    }

    methods: tuple[MethodName, ...] = ("ghost_batch_norm",)
    batch_size: PositiveInt = 128
    group_sizes: tuple[PositiveInt, ...] = (128, 32, 16, 8, 4, 2)

    def runs(self, dataset: Dataset) -> list[Run]:
        return [
            self.make_run(
                dataset, method, size, label=METHODS[method].label, regime=f"n = {size}", batch_size=self.batch_size,
                seed=seed, measures="ranges",
            )
            for method in self.methods
            for size in self.group_sizes
            for seed in self.seed_numbers
        ]  # fmt: skip
