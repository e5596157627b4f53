"""Metric learning, where minibatches cannot be independent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..data.classes import load_unseen
from ..errors import LabError
from ..networks.methods import MethodName, rows
from ..recipe import TINY, Recipe, Scales
from ..runs import Run


@dataclass(frozen=True, kw_only=True)
class Metric(Recipe):
    """Learn embeddings on minibatches of P classes x K examples, and find the nearest neighbours of unseen classes.

    Accuracies are recall@1: how often an example's nearest neighbour is of its own class, among all examples of
    classes that the training does not have. An .npz file whose test classes are not among the training's is taken as
    it is, with a fifth of the training classes held out for validation; otherwise classes are split.

    Args:
        batch_size: examples in a minibatch.
        examples_per_class: examples of a class in a minibatch, two columns of the table each.
        ghost_sizes: examples that share statistics in ghost batch norm, one row of the table each.
        group_size: examples that share statistics in batch-group norm.
    """

    name: ClassVar[str] = "metric"
    title: ClassVar[str] = "Metric learning on unseen classes"
    claim: ClassVar[str] = "dependent minibatches, as metric learning needs, hurt batch norm; no figures"
    source: ClassVar[str] = "Ioffe 2017, 1 and 4.3"
    score: ClassVar[str] = "recall@1"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"batch_size": 16, "examples_per_class": (4,), "ghost_sizes": (8,)},
        "small": {"data": "omniglot", "model": "resnet8", "steps": 3_000, "lr": 0.1},
        "paper": {"data": "omniglot", "model": "resnet20", "steps": 30_000, "lr": 0.1, "device": "cuda"},
    }

    methods: tuple[MethodName, ...] = (
        "batch_norm", "batch_renorm", "ghost_batch_norm", "batch_group_norm", "group_norm"
    )  # fmt: skip
    batch_size: PositiveInt = 64
    examples_per_class: tuple[PositiveInt, ...] = (2, 8)
    ghost_sizes: tuple[PositiveInt, ...] = (16,)
    group_size: PositiveInt = 2

    def load(self) -> Dataset:
        if self.classes is not None:
            raise LabError(f"classes cannot be {self.classes} in recipe metric, which splits all classes: leave it out")
        return load_unseen(self.data, self.data_root, self.image_size)

    def runs(self, dataset: Dataset) -> list[Run]:
        if max(self.examples_per_class, default=1) > self.batch_size:
            raise LabError(f"batch_size must be at least examples_per_class={max(self.examples_per_class)}, "
                           f"got {self.batch_size}")  # fmt: skip
        return [
            self.make_run(
                dataset, method, size, label=label, regime=f"{self.batch_size // examples} classes x {examples}",
                batch_size=self.batch_size // examples * examples, seed=seed, objective="metric",
                classes_per_batch=self.batch_size // examples, examples_per_class=examples,
            )
            for method in self.methods
            for label, size in rows(method, self.ghost_sizes, self.group_size)
            for examples in self.examples_per_class
            for seed in self.seed_numbers
        ]  # fmt: skip
