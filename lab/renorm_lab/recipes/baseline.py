"""Independent minibatches: where there is nothing to repair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..networks.methods import MethodName
from ..recipe import IOFFE, SMALL, TINY, Recipe, Scales
from ..runs import Run


@dataclass(frozen=True, kw_only=True)
class Baseline(Recipe):
    """Train on independent minibatches, where batch renorm should lose nothing to batch norm.

    Args:
        batch_size: examples that are normalized together.
        minibatches: how many of them make a step, each normalized by itself, as on several workers; 50 in the paper.
    """

    name: ClassVar[str] = "baseline"
    title: ClassVar[str] = "Batch norm and batch renorm on independent minibatches"
    claim: ClassVar[str] = "batch renorm does as well as batch norm (78.5 and 78.3%)"
    source: ClassVar[str] = "Ioffe 2017, 4.1"
    scales: ClassVar[Scales] = {"tiny": TINY, "small": SMALL, "paper": IOFFE | {"minibatches": 50}}

    methods: tuple[MethodName, ...] = ("batch_norm", "batch_renorm")
    batch_size: PositiveInt = 32
    minibatches: PositiveInt = 1

    def runs(self, dataset: Dataset) -> list[Run]:
        size = self.batch_size * self.minibatches
        return [
            self.make_run(
                dataset, method, None, regime="i.i.d.", batch_size=size, seed=seed,
                forward_size=self.batch_size if self.minibatches > 1 else None,
            )
            for method in self.methods
            for seed in self.seed_numbers
        ]  # fmt: skip
