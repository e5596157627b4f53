"""What every recipe has: options, and a list of runs made from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jsonargparse.typing import OpenUnitInterval, PositiveFloat, PositiveInt

from .data import Dataset
from .methods import METHODS, MethodName
from .models import ModelName
from .runs import Run


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """An experiment: options, from the command line, and the runs that they make.

    A recipe is a subclass in a file of its own: `name`, `title`, options of its own and `runs`.

    Args:
        data: what to train on: digits (comes with scikit-learn), the name of a torchvision data set such as cifar100,
            an .npz file with x_train, y_train, x_test and y_test (images uint8 of shape N, H, W, C), or a folder of
            images, train/CLASS/IMAGE and test/CLASS/IMAGE, or just CLASS/IMAGE.
        data_root: folder of torchvision's data sets, downloaded into it if missing.
        image_size: height and width in pixels to which images from a folder are resized and cropped.
        model: network; by default mlp (4 hidden layers of 128) for digits and resnet8 for everything else.
        methods: normalization methods to compare.
        seeds: number of seeds, and so of runs behind each cell of the table.
        steps: training steps of a run.
        lr: learning rate of SGD with momentum 0.9; decays to 0 along a cosine.
        momentum: weight of a new minibatch in the running statistics, the same for all methods.
        augment: crop and flip training images at random; by default only colour images of 32 x 32 pixels.
        out: folder for results, plots and tables; by default runs/RECIPE-DATA.
        device: where to train, such as cpu or cuda.
        workers: number of processes, of one thread each, that train side by side on the CPU; by default the number
            of CPU cores.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    data: str = "digits"
    data_root: Path = Path("data")
    image_size: PositiveInt = 32
    model: ModelName | None = None
    methods: tuple[MethodName, ...] = tuple(METHODS)
    seeds: PositiveInt = 3
    steps: PositiveInt = 1_000
    lr: PositiveFloat = 0.05
    momentum: OpenUnitInterval = 0.05
    augment: bool | None = None
    out: Path | None = None
    device: str = "cpu"
    workers: PositiveInt | None = None

    @abstractmethod
    def runs(self, dataset: Dataset) -> list[Run]:
        """The runs, in the order of the table: `make_run` for each regime, method and seed.

        Args:
            dataset: what will be trained on.

        Returns:
            The runs, each with a regime, method and seed of its own.
        """

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("runs") / f"{self.name}-{Path(self.data).stem}"

    def make_run(
        self,
        dataset: Dataset,
        method: MethodName,
        examples_per_group: int | None,
        *,
        regime: str,
        batch_size: int,
        seed: int,
        label: str | None = None,
        forward_size: int | None = None,
        classes_per_batch: int | None = None,
        examples_per_class: int | None = None,
    ) -> Run:
        """A run with the options that all recipes share.

        Args:
            dataset: what will be trained on.
            method: normalization method.
            label: row of the table; by default the method's own.
            examples_per_group: see `Run`, as for everything else.

        Returns:
            The run.
        """
        setting = METHODS[method]
        colour_32 = dataset.image_shape == (3, 32, 32)
        return Run(
            recipe=self.name,
            data=self.data,
            model=self.model or ("mlp" if self.data == "digits" else "resnet8"),
            regime=regime,
            method=label or setting.label,
            tracking=setting.tracking,
            limits=setting.limits,
            examples_per_group=examples_per_group,
            channels_per_group=setting.channels_per_group,
            classes_per_batch=classes_per_batch,
            examples_per_class=examples_per_class,
            batch_size=batch_size,
            forward_size=forward_size,
            steps=self.steps,
            lr=self.lr,
            momentum=self.momentum,
            augment=colour_32 if self.augment is None else self.augment,
            seed=seed,
        )
