"""Minibatches of few classes against independent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..networks.methods import METHODS, MethodName, rows
from ..recipe import IOFFE, SMALL, TINY, Recipe, Scales
from ..runs import Run


@dataclass(frozen=True, kw_only=True)
class NonIid(Recipe):
    """Train on independent minibatches and on minibatches of few classes, and compare the normalization methods.

    The default regime is a rough one, in which batch norm loses several points on digits: accuracies vary between
    seeds, those of batch-group norm most of all, some of whose trainings fail. At a learning rate of 0.02 every
    method reaches 96 to 97%, and they are level.

    Test accuracy is measured in training mode too, where the network normalizes by batches of 25 classes x 2 examples.

    Args:
        classes_per_batch: classes in a dependent minibatch, drawn at random for each.
        examples_per_class: examples of each of them; the independent minibatches have as many examples in all.
        replacement: draw the classes of a minibatch with replacement.
        minibatches: how many make a step, each drawn and normalized by itself, as on several workers; 50 in the paper.
        independent: train on independent minibatches too.
        split: a row of batch norm over the halves of a minibatch, with every class spread over both.
        ghost_sizes: examples that share statistics in ghost batch norm, one row of the table each.
        group_size: examples that share statistics in batch-group norm.
    """

    name: ClassVar[str] = "noniid"
    title: ClassVar[str] = "Independent minibatches and minibatches of few classes"
    claim: ClassVar[str] = "batch norm falls from 78.3 to 67.0%, with split pairs to 77.4%; batch renorm stays at 78.5%"
    source: ClassVar[str] = "Ioffe 2017, 4.3"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"split": True, "ghost_sizes": (8,)},
        "small": SMALL | {"classes_per_batch": 16, "examples_per_class": 2, "replacement": True, "split": True},
        "paper": IOFFE
        | {"methods": ("batch_norm", "batch_renorm"), "classes_per_batch": 16, "examples_per_class": 2,
           "replacement": True, "minibatches": 50, "split": True},
    }  # fmt: skip

    classes_per_batch: PositiveInt = 2
    examples_per_class: PositiveInt = 16
    replacement: bool = False
    minibatches: PositiveInt = 1
    independent: bool = True
    split: bool = False
    ghost_sizes: tuple[PositiveInt, ...] = (16, 8)
    group_size: PositiveInt = 2

    def runs(self, dataset: Dataset) -> list[Run]:
        classes, examples = self.classes_per_batch, self.examples_per_class
        size = classes * examples
        independent: list[tuple[str, dict[str, Any]]] = [("i.i.d.", {})] if self.independent else []
        sampling = {"classes_per_batch": classes, "examples_per_class": examples, "replacement": self.replacement}
        regimes = [*independent, (f"{classes} classes x {examples}", sampling)]
        lines: list[tuple[MethodName, str, int | None, dict[str, Any]]] = [
            (method, label, group, {})
            for method in self.methods
            for label, group in rows(method, self.ghost_sizes, self.group_size)
        ]
        if self.split:
            label = f"{METHODS['batch_norm'].label}, split halves"
            lines.append(("batch_norm", label, size // 2, {"order": "split"}))
        return [
            self.make_run(
                dataset, method, group, label=label, regime=regime, seed=seed, batch_size=size * self.minibatches,
                forward_size=size if self.minibatches > 1 else None, measures="training mode+training batches",
                **(sampling | order if sampling else {}),
            )
            for method, label, group, order in lines
            for regime, sampling in regimes
            for seed in self.seed_numbers
        ]  # fmt: skip
