"""A pretrained network with a regression head, in small batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..data.hidden import hidden
from ..recipe import Scales
from ..runs import Run
from .finetune import Finetune


@dataclass(frozen=True, kw_only=True)
class FinetuneRegression(Finetune):
    """Fine-tune as the recipe finetune does, with a regression head: which mean colour has an image's hidden centre?

    The score is the explained variance, 0 for whoever knows the mean over all images alone. Such targets cost no
    labels, so that all images are trained on.

    Args:
        examples_per_class: training images of each class that are used; by default all.
    """

    name: ClassVar[str] = "finetune-regression"
    title: ClassVar[str] = "Fine-tuning of a pretrained network for a regression"
    claim: ClassVar[str] = "what depends on absolute values suffers most from normalizing by small batches"
    source: ClassVar[str] = "beyond both papers"
    score: ClassVar[str] = "explained variance"
    scales: ClassVar[Scales] = {
        "tiny": {**Finetune.scales["tiny"], "examples_per_class": None},
        "small": Finetune.scales["small"],
        "paper": {**Finetune.scales["paper"], "image_size": 64},
    }

    examples_per_class: PositiveInt | None = None

    def load(self) -> Dataset:
        return hidden(super().load())

    def runs(self, dataset: Dataset) -> list[Run]:
        return [replace(run, objective="regression") for run in super().runs(dataset)]
