"""A pretrained network on a small data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from ..data import Dataset
from ..data.classes import set_aside
from ..networks.methods import METHODS, MethodName
from ..recipe import SMALL, SUMMERS, TINY, Recipe, Scales
from ..runs import Run


@dataclass(frozen=True, kw_only=True)
class Finetune(Recipe):
    """Fine-tune a network of plain batch norm with every method, on few examples of each class.

    Where the network has no weights to download (tiny, small) it is trained first on half of the classes, and
    fine-tuned on the others.

    Args:
        batch_size: examples in a minibatch.
        ghost_size: examples that share statistics in ghost batch norm, and in all four together.
        group_size: examples that share statistics in batch-group norm.
        pretrained: start from the weights that timm has for the model, downloaded if missing.
        pretraining_steps: otherwise, steps of training on half of the classes; 0 for none.
        examples_per_class: training images of each class that are used; by default all.
        weight_decay: of weights, and of gamma and beta in all four.
    """

    name: ClassVar[str] = "finetune"
    title: ClassVar[str] = "Fine-tuning of a pretrained network"
    claim: ClassVar[str] = "all four gain 2.4 points on Flowers-102 (91.0 to 93.4%), 1.4 on CUB-2011"
    source: ClassVar[str] = "Summers & Dinneen 2020, 4.3"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"pretraining_steps": 60, "examples_per_class": 20},
        "small": SMALL | {"steps": 600, "lr": 0.02, "pretraining_steps": 3_000},
        "paper": SUMMERS
        | {"data": "flowers102", "image_size": 224, "model": "timm/resnet152", "pretrained": True, "steps": 3_000,
           "lr": 0.01, "pretraining_steps": 0, "examples_per_class": None, "augment": True},
    }  # fmt: skip

    methods: tuple[MethodName, ...] = ("batch_norm", "batch_renorm", "group_norm")
    batch_size: PositiveInt = 32
    ghost_size: PositiveInt = 8
    group_size: PositiveInt = 2
    pretrained: bool = False
    pretraining_steps: NonNegativeInt = 300
    examples_per_class: PositiveInt | None = 30
    weight_decay: PositiveFloat = 5e-4

    def load(self) -> Dataset:
        return set_aside(super().load(), self._first_steps > 0, self.examples_per_class)

    def runs(self, dataset: Dataset) -> list[Run]:
        lines: list[tuple[MethodName, str, dict[str, Any]]] = [
            *((method, METHODS[method].label, {"norm_decay": "none"}) for method in self.methods),
            ("ghost_batch_norm", f"all four, n = {self.ghost_size}", {"norm_decay": "all"}),
        ]
        sizes = {"ghost_batch_norm": self.ghost_size}
        sizes |= dict.fromkeys(("batch_group_norm", "batch_group_renorm"), self.group_size)
        return [
            self.make_run(
                dataset, method, sizes.get(method), label=label, regime="fine-tuned", batch_size=self.batch_size,
                seed=seed, pretrained=self.pretrained, pretraining_steps=self._first_steps, **changes,
            )
            for method, label, changes in lines
            for seed in self.seed_numbers
        ]  # fmt: skip

    @property
    def _first_steps(self) -> int:
        return 0 if self.pretrained else self.pretraining_steps
