"""Weight decay of gamma and beta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jsonargparse.typing import PositiveFloat, PositiveInt

from ..data import Dataset
from ..networks.methods import METHODS, MethodName
from ..recipe import SMALL, SUMMERS, TINY, Recipe, Scales
from ..runs import Decay, Run

_LABELS: dict[Decay, str] = {
    "none": "gamma, beta not decayed",
    "all": "gamma, beta toward 0",
    "one": "gamma toward 1, beta toward 0",
    "auto": "gamma, beta toward 0 where no norm follows",
}


@dataclass(frozen=True, kw_only=True)
class WeightDecay(Recipe):
    """Decay gamma and beta or not, in networks with and without paths to the output that no other norm layer ends.

    Args:
        batch_size: examples in a minibatch.
        decays: what is decayed besides the weights, one row of the table for each.
        models: networks to compare, two columns of the table each; --model is not used.
        weight_decay: of all that is decayed.
    """

    name: ClassVar[str] = "decay"
    title: ClassVar[str] = "Weight decay of gamma and beta"
    claim: ClassVar[str] = "helps residual networks, toward 0 or 1 alike; hurts Inception-v3"
    source: ClassVar[str] = "Summers & Dinneen 2020, 3.3"
    scales: ClassVar[Scales] = {
        "tiny": TINY,
        "small": SMALL | {"steps": 1_500},
        "paper": SUMMERS
        | {"data": "caltech256", "image_size": 299, "models": ("torchvision/inception_v3", "torchvision/resnet50"),
           "batch_size": 32, "augment": True},
    }  # fmt: skip

    methods: tuple[MethodName, ...] = ("batch_norm",)
    batch_size: PositiveInt = 128
    decays: tuple[Decay, ...] = ("none", "all", "one", "auto")
    models: tuple[str, ...] = ("resnet8", "plain8")
    weight_decay: PositiveFloat = 5e-4

    def runs(self, dataset: Dataset) -> list[Run]:
        return [
            self.make_run(
                dataset, method, None, regime=model, batch_size=self.batch_size,
                seed=seed, label=f"{METHODS[method].label}, {_LABELS[decay]}", model=model, norm_decay=decay,
            )
            for method in self.methods
            for decay in self.decays
            for model in self.models
            for seed in self.seed_numbers
        ]  # fmt: skip
