"""Batches of one to sixteen examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..networks.methods import METHODS, MethodName
from ..recipe import SMALL, SUMMERS, TINY, Recipe, Scales
from ..runs import Run


@dataclass(frozen=True, kw_only=True)
class SmallBatch(Recipe):
    """Train with small batches, on as many examples each time, and compare the normalization methods.

    Learning rate and steps are those for `reference_size` examples; the learning rate grows with the batch, the steps
    shrink. There is no batch norm of a single example.

    Args:
        batch_sizes: examples in a minibatch, two columns of the table each.
        reference_size: batch size that steps and lr are for.
        group_size: examples that share statistics in batch-group norm, where the batch has as many.
    """

    name: ClassVar[str] = "smallbatch"
    title: ClassVar[str] = "Small batches"
    claim: ClassVar[str] = "at 2 examples batch-group norm beats group norm, 74.60 to 73.91% (CIFAR-100)"
    source: ClassVar[str] = "Summers & Dinneen 2020, 3.4"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"batch_sizes": (8, 1), "reference_size": 8},
        "small": SMALL | {"steps": 500, "batch_sizes": (16, 4, 2)},
        "paper": SUMMERS | {"batch_sizes": (2,)},
    }

    methods: tuple[MethodName, ...] = ("batch_norm", "batch_renorm", "group_norm", "batch_group_norm")
    batch_sizes: tuple[PositiveInt, ...] = (16, 8, 4, 2, 1)
    reference_size: PositiveInt = 128
    group_size: PositiveInt = 2
    steps: PositiveInt = 250

    def runs(self, dataset: Dataset) -> list[Run]:
        return [
            self.sized_run(
                dataset, method, self._group(method, size), label=METHODS[method].label, size=size, seed=seed
            )
            for method in self.methods
            for size in self.batch_sizes
            for seed in self.seed_numbers
            if (method, size) != ("batch_norm", 1)
        ]

    def sized_run(
        self,
        dataset: Dataset,
        method: MethodName,
        group: int | None,
        *,
        label: str,
        size: int,
        seed: int,
        **changes: Any,
    ) -> Run:
        """A run with a batch size, on as many examples as with another."""
        ratio = size / self.reference_size
        return self.make_run(
            dataset, method, group, label=label, batch_size=size, seed=seed,
            steps=max(1, round(self.steps / ratio)), lr=self.lr * ratio, **({"regime": f"batch size {size}"} | changes),
        )  # fmt: skip

    def _group(self, method: MethodName, size: int) -> int | None:
        return min(self.group_size, size) if METHODS[method].channels_per_group > 1 else None
