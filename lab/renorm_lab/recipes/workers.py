"""Workers that each hold a few classes of their own, and average their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from jsonargparse.typing import OpenUnitInterval, PositiveFloat, PositiveInt

from ..data import Dataset
from ..errors import LabError
from ..networks.methods import METHODS, MethodName, labelled_rows
from ..recipe import SMALL, SUMMERS, TINY, Recipe, Scales, check_rates
from ..runs import Run
from ..summary import Summary


@dataclass(frozen=True, kw_only=True)
class Workers(Recipe):
    """Normalize by the examples of one worker, which are of few classes, while gradients are averaged over all workers.

    Every minibatch has all classes, so that its gradient is that of independent examples. What depends on each other
    are the statistics: each worker's are those of its own classes. The column of all classes is that of synchronized
    statistics, the remedy where workers can afford to wait for each other in every layer.

    Args:
        classes_per_worker: classes that share statistics, which divide all of them; a column of the table each.
        examples_per_class: examples of each class in a minibatch.
        group_size: examples that share statistics in batch-group norm.
        rates: learning rates of rows of the table that have another than lr, by name.
        synchronized: whether the table has the column of statistics over all classes.
        frozen_shares: rows of batch norm that is frozen to its running statistics for this share of the training, at
            its end (Wu & Johnson 2021).
        model: see above; by default plain8, in which nothing leads around the normalization layers.
    """

    name: ClassVar[str] = "workers"
    title: ClassVar[str] = "Workers that hold their own classes"
    claim: ClassVar[str] = (
        "batch norm fails at evaluation where workers hold classes of their own; batch renorm does not"
    )
    source: ClassVar[str] = "Hsieh et al. 2020; Ioffe 2017, 3; beyond both papers"
    shows_training: ClassVar[bool] = True
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"classes_per_worker": (1,), "examples_per_class": 2},
        "small": SMALL | {"image_size": 16, "classes_per_worker": (1, 5), "examples_per_class": 2, "steps": 2_000},
        "paper": SUMMERS | {"classes_per_worker": (1, 5), "examples_per_class": 4},
    }

    methods: tuple[MethodName, ...] = (
        "batch_norm", "batch_renorm_unlimited", "batch_renorm", "batch_renorm_close", "batch_group_norm", "group_norm"
    )  # fmt: skip
    model: str | None = "plain8"
    steps: PositiveInt = 600
    momentum: OpenUnitInterval = 0.1  # of Limits.over(600), as for users of the library
    lr: PositiveFloat = 0.1
    classes_per_worker: tuple[PositiveInt, ...] = (1, 2)
    examples_per_class: PositiveInt = 4
    group_size: PositiveInt = 2
    rates: Mapping[str, PositiveFloat] = field(default_factory=dict)
    synchronized: bool = True
    frozen_shares: tuple[OpenUnitInterval, ...] = (0.1, 0.5)

    def runs(self, dataset: Dataset) -> list[Run]:
        classes, examples = dataset.num_classes, self.examples_per_class
        for number in self.classes_per_worker:
            if classes % number:
                raise LabError(f"classes_per_worker must divide the {classes} classes of {self.data}, got {number}")
        columns = {f"{number} class{'es' * (number > 1)} each": number * examples for number in self.classes_per_worker}
        if self.synchronized:
            columns["synchronized"] = classes * examples
        rows = labelled_rows(self.methods, self.frozen_shares)
        check_rates(self.rates, rows)
        return [
            self.make_run(
                dataset, method, self.group_size if method == "batch_group_norm" else shared, label=label,
                regime=regime, seed=seed, batch_size=classes * examples, classes_per_batch=classes,
                examples_per_class=examples, order="class", measures="like training+training batches",
                lr=self.rates.get(label, self.lr), **change,
            )
            for label, (method, change) in rows.items()
            for regime, shared in columns.items()
            for seed in self.seed_numbers
        ]  # fmt: skip

    def conclusion(self, summary: Summary) -> str:
        """What batch norm and its remedies do where every worker holds the fewest classes."""
        regime = summary.regimes[0]
        batch_norm, remedy = ((METHODS[name].label, regime) for name in ("batch_norm", "batch_renorm_unlimited"))
        if not self.classes_per_worker or not {batch_norm, remedy} <= summary.off.keys():
            return ""
        trained, off, on = (cells[batch_norm].mean for cells in (summary.trained, summary.off, summary.on))
        return (
            f"Trained where every worker sees {regime.removesuffix(' each')}, batch norm is right {trained:.0f}% of "
            f"the time in training and {off:.0f}% at evaluation, batch renorm without limits "
            f"{summary.off[remedy].mean:.0f}%; weighing the trained batch-norm network, {on:.0f}%."
        )
