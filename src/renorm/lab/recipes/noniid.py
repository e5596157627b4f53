"""Minibatches of few classes against independent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..methods import METHODS, MethodName
from ..recipe import Recipe
from ..runs import Run


@dataclass(frozen=True, kw_only=True)
class NonIid(Recipe):
    """Train on independent minibatches and on minibatches of few classes, and compare the normalization methods.

    The default regime is a rough one, in which batch norm loses several points on digits: accuracies vary between
    seeds, those of batch-group norm most of all, some of whose trainings fail. At a learning rate of 0.02 every
    method reaches 96 to 97%, and they are level.

    Args:
        classes_per_batch: classes in a dependent minibatch, drawn at random for each.
        examples_per_class: examples of each of them; the independent minibatches have as many examples in all.
        ghost_sizes: examples that share statistics in ghost batch norm, one row of the table each.
        group_size: examples that share statistics in batch-group norm.
    """

    name: ClassVar[str] = "noniid"
    title: ClassVar[str] = "Independent minibatches and minibatches of few classes"

    classes_per_batch: PositiveInt = 2
    examples_per_class: PositiveInt = 16
    ghost_sizes: tuple[PositiveInt, ...] = (16, 8)
    group_size: PositiveInt = 2

    def runs(self, dataset: Dataset) -> list[Run]:
        classes, examples = self.classes_per_batch, self.examples_per_class
        regimes: list[tuple[str, dict[str, int]]] = [
            ("i.i.d.", {}),
            (f"{classes} classes x {examples}", {"classes_per_batch": classes, "examples_per_class": examples}),
        ]
        return [
            self.make_run(
                dataset, method, size, label=label, regime=regime, batch_size=classes * examples, seed=seed, **sampling
            )
            for method in self.methods
            for label, size in self._rows(method)
            for regime, sampling in regimes
            for seed in range(self.seeds)
        ]

    def _rows(self, method: MethodName) -> list[tuple[str, int | None]]:
        label = METHODS[method].label
        if method in ("batch_norm", "batch_renorm"):
            return [(label, None)]
        sizes = self.ghost_sizes if method == "ghost_batch_norm" else (self.group_size,)
        return [(f"{label}, n = {size}", size) for size in sizes]
