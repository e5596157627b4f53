"""A pretrained network on a small data set, in small batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ..data import Dataset
from ..data.classes import set_aside
from ..networks.methods import MethodName, labelled_rows
from ..recipe import SMALL, SUMMERS, TINY, Scales, check_rates
from ..runs import Run
from .smallbatch import SmallBatch


@dataclass(frozen=True, kw_only=True)
class Finetune(SmallBatch):
    """Fine-tune a network of plain batch norm with every method, in small batches, and average its weights over time.

    Where the network has no weights to download (tiny, small) it is trained first on half of the classes, and
    fine-tuned on the others. Running statistics are good from the first step on, and so limits are constant. Steps, lr
    and average are those for `reference_size` examples. The table is of averaged weights and running statistics;
    measures.csv has the last weights, and averaged ones with statistics copied from the last step or estimated anew.

    Args:
        rates: learning rates of rows of the table that have another than lr, by name.
        frozen_shares: rows of batch norm that is frozen to its running statistics for this share of the training, at
            its end.
        ghost_size: examples that share statistics in ghost batch norm and in all four together, where a batch has more.
        pretrained: start from the weights that timm has for the model, downloaded if missing.
        pretraining_steps: otherwise, steps of training on half of the classes, once for each seed; 0 for none.
        examples_per_class: training images of each class that are used; by default all.
        weight_decay: of weights, and of gamma and beta in all four.
    """

    name: ClassVar[str] = "finetune"
    title: ClassVar[str] = "Fine-tuning of a pretrained network"
    claim: ClassVar[str] = "all four gain 2.4 points on Flowers-102 (91.0 to 93.4%), 1.4 on CUB-2011"
    source: ClassVar[str] = "Summers & Dinneen 2020, 4.3"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"batch_sizes": (8, 1), "pretraining_steps": 60, "examples_per_class": 20},
        "small": SMALL | {"steps": 1_200, "lr": 0.02, "image_size": 16, "pretraining_steps": 1_000},
        "paper": SUMMERS
        | {"data": "flowers102", "image_size": 224, "model": "timm/resnet152", "pretrained": True, "steps": 3_000,
           "batch_sizes": (32,), "reference_size": 32, "ghost_size": 8, "lr": 0.01, "average": 0.0,
           "pretraining_steps": 0, "examples_per_class": None, "augment": True},
    }  # fmt: skip

    methods: tuple[MethodName, ...] = (
        "batch_norm", "batch_renorm", "batch_renorm_close", "batch_renorm_unlimited", "group_norm"
    )  # fmt: skip
    model: str | None = "resnet8"
    batch_sizes: tuple[PositiveInt, ...] = (8, 4, 2, 1)
    reference_size: PositiveInt = 8
    steps: PositiveInt = 150
    lr: PositiveFloat = 0.02
    momentum: ClosedUnitInterval = 0.01
    average: NonNegativeFloat = 0.98
    rates: Mapping[str, PositiveFloat] = field(default_factory=dict)
    frozen_shares: tuple[ClosedUnitInterval, ...] = (1.0,)
    ghost_size: PositiveInt = 4
    pretrained: bool = False
    pretraining_steps: NonNegativeInt = 300
    examples_per_class: PositiveInt | None = 30
    weight_decay: PositiveFloat = 5e-4

    def load(self) -> Dataset:
        return set_aside(super().load(), self._first_steps > 0, self.examples_per_class)

    def runs(self, dataset: Dataset) -> list[Run]:
        rows = labelled_rows(self.methods, self.frozen_shares)
        rows[f"all four, n = {self.ghost_size}"] = "ghost_batch_norm", {"norm_decay": "all"}
        check_rates(self.rates, rows)
        common = {"pretrained": self.pretrained, "pretraining_steps": self._first_steps, "norm_decay": "none",
                  "plain_phase": 0.0, "ramps": 0.0, "measures": "averages" if self.average else ""}  # fmt: skip
        return [
            replace(self, lr=self.rates.get(label, self.lr)).sized_run(
                dataset, method, self._group(method, size), label=label, size=size, seed=seed,
                **common | {"average": self.average ** (size / self.reference_size)} | changes,
            )
            for label, (method, changes) in rows.items()
            for size in self.batch_sizes
            for seed in self.seed_numbers
            if method != "ghost_batch_norm" or size > self.ghost_size
        ]  # fmt: skip

    def _group(self, method: MethodName, size: int) -> int | None:
        return self.ghost_size if method == "ghost_batch_norm" else super()._group(method, size)

    @property
    def _first_steps(self) -> int:
        return 0 if self.pretrained else self.pretraining_steps
