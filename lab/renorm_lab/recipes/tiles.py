"""Segmentation of scenes that are cut into tiles, with one or two tiles in a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jsonargparse.typing import OpenUnitInterval, PositiveFloat, PositiveInt

from ..data import Dataset
from ..data.scenes import compose
from ..errors import LabError
from ..networks.methods import MethodName, labelled_rows
from ..recipe import TINY, Recipe, Scales
from ..runs import Run


@dataclass(frozen=True, kw_only=True)
class Tiles(Recipe):
    """Segment scenes of 256 x 256 pixels by a small U-Net that is trained on patches of 64 x 64, few at a time.

    Scenes are composed of the data's images, with crowded and empty places. The table has Dice on whole scenes.
    Measured besides, at evaluation and in training mode: Dice by tiles, and how far overlapping tiles disagree beyond
    the receptive field.

    Args:
        batch_sizes: patches in a minibatch, a column of the table each.
        groups: classes of pixels beside the background: the data's classes, divided in their order.
        scenes: scenes for the test; four times as many are for training, 64 patches of each, and half as many for
            validation.
        frozen_shares: rows of batch norm that is frozen to its running statistics for this share of the training, at
            its end.
        model: unetN; by default unet8, with 8, 16 and 32 channels.
    """

    name: ClassVar[str] = "tiles"
    title: ClassVar[str] = "Segmentation by tiles"
    claim: ClassVar[str] = (
        "instance norm leaves seams between tiles, batch norm loses between training and evaluation; batch renorm does "
        "neither"
    )
    source: ClassVar[str] = "Buglakova et al. 2025; beyond both papers"
    score: ClassVar[str] = "Dice"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"methods": ("batch_norm", "instance_norm"), "batch_sizes": (1,), "scenes": 1,
                        "frozen_shares": (), "steps": 100},
        "small": {"data": "fashionmnist"},
        "paper": {"data": "fashionmnist", "model": "unet32", "scenes": 32, "steps": 20_000, "device": "cuda"},
    }  # fmt: skip

    methods: tuple[MethodName, ...] = (
        "batch_norm", "batch_renorm", "batch_renorm_unlimited", "group_norm", "instance_norm"
    )  # fmt: skip
    model: str | None = "unet8"
    steps: PositiveInt = 600
    lr: PositiveFloat = 0.05
    momentum: OpenUnitInterval = 0.02
    batch_sizes: tuple[PositiveInt, ...] = (1, 2)
    groups: PositiveInt = 1
    scenes: PositiveInt = 6
    frozen_shares: tuple[OpenUnitInterval, ...] = (0.1, 0.5)

    def load(self) -> Dataset:
        if self.augment:
            raise LabError(
                "augment cannot be true in recipe tiles, whose labels would stay where they were: leave it out"
            )
        try:
            return compose(super().load(), self.groups, self.scenes)
        except ValueError as error:
            raise LabError(str(error)) from None

    def runs(self, dataset: Dataset) -> list[Run]:
        return [
            self.make_run(
                dataset, method, None, label=label, regime=f"{size} patch{'es' * (size > 1)} a batch", seed=seed,
                batch_size=size, objective="segmentation", measures="tiles", **change,
            )
            for label, (method, change) in labelled_rows(self.methods, self.frozen_shares).items()
            for size in self.batch_sizes
            for seed in self.seed_numbers
        ]  # fmt: skip
