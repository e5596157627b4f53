"""What every recipe has: options, and a list of runs made from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt

from .data import Dataset, load_dataset
from .data.load import dataset_name
from .errors import LabError
from .networks.methods import METHODS, MethodName
from .runs import Decay, Precision, Run
from .summary import Summary

Scale = Literal["tiny", "small", "paper"]
Scales = Mapping[Scale, Mapping[str, Any]]
LoggerName = Literal["tensorboard", "csv", "mlflow", "wandb", "none"]

# Defaults that recipes of a scale share: tiny takes seconds, small about an hour on two CPU cores.
TINY: dict[str, Any] = {"steps": 40, "seeds": 1}
SMALL: dict[str, Any] = {"data": "cifar100", "model": "resnet8", "steps": 3_000, "lr": 0.1, "weight_decay": 5e-4}
# Ioffe 2017: Inception-v3 on ImageNet; what the paper does not tell is Szegedy et al. 2016.
IOFFE: dict[str, Any] = {
    "data": "imagenet", "image_size": 299, "model": "torchvision/inception_v3", "seeds": 1, "steps": 130_000,
    "lr": 0.045, "optimizer": "rmsprop", "schedule": "exponential", "average": 0.9999, "train_gamma": False,
    "momentum": 0.01, "augment": True, "device": "cuda",
}  # fmt: skip
# Summers & Dinneen 2020: ResNet-18 on CIFAR-100; learning rate, decay and the 60 epochs are ours.
SUMMERS: dict[str, Any] = {
    "data": "cifar100", "model": "resnet18", "steps": 18_750, "lr": 0.1, "weight_decay": 5e-4, "momentum": 0.01,
    "device": "cuda", "precision": "bf16-mixed",
}  # fmt: skip

_MOST_SEEDS, _LARGEST_SEED = 10_000, 2**63  # as torch takes them


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """An experiment: options, from the command line, and the runs that they make.

    A recipe is a subclass in a file of its own: `name`, `title`, `claim`, `source`, options of its own and `runs`.

    Args:
        scale: another set of defaults: tiny takes seconds on digits, small an hour on CIFAR-100, paper is the papers'
            own setting. Other options override it.
        data: what to train on: digits (comes with scikit-learn); cifar10, cifar100, svhn, svhn-extra, mnist,
            fashionmnist, kmnist or omniglot, which torchvision downloads; imagenet, caltech256, flowers102 or cub2011;
            an .npz file with x_train, y_train, x_test and y_test (images uint8 of shape N, H, W, C); or a folder of
            images, train/CLASS/IMAGE and test/CLASS/IMAGE (or val), or just CLASS/IMAGE.
        data_root: folder of the data sets that have a name.
        classes: number of classes to train on, the first ones; by default all.
        image_size: height and width in pixels to which images from a folder are resized and cropped, and larger images
            of other data sets; those from a folder stay in their files above 64, and are decoded as they are needed.
        model: network: mlp (4 hidden layers of 128), resnet8, resnet20 and so on, plain8 (without shortcuts),
            resnet18 (64 to 512 channels), unetN (N to 4N channels, for segmentation), timm/NAME or torchvision/NAME; by
            default mlp for digits and resnet8 for everything else.
        methods: normalization methods to compare.
        seeds: number of seeds, and so of runs behind each cell of the table.
        first_seed: number of the first of them; settings are chosen on others than the table's.
        steps: training steps of a run.
        lr: learning rate.
        momentum: weight of a new minibatch in the running statistics, the same for all methods.
        augment: crop and flip training images at random; by default only colour images of 32 x 32 pixels.
        optimizer: sgd with momentum 0.9, or rmsprop as in TensorFlow.
        schedule: how the learning rate falls: along a cosine to 0, or exponential, times 0.94 every two epochs.
        weight_decay: decay of weights toward 0, times the learning rate in each step.
        norm_decay: whether gamma and beta are decayed too: all, none, auto (only where no normalization layer follows),
            or one (all, gamma toward 1).
        average: evaluate an exponential moving average of weights and statistics with this decay; 0 for none.
        train_gamma: whether gamma is trained, or stays 1.
        precision: of the computation; losses are in float32.
        out: folder for results, plots and tables; by default runs/RECIPE-DATA.
        device: where to train, such as cpu or cuda.
        workers: number of processes, of one thread each, that train side by side on the CPU; by default the number
            of CPU cores.
        compile: train with torch.compile.
        checkpoint_every: steps between the checkpoints from which an interrupted run goes on.
        logger: where loss, learning rate and accuracy go besides curves.csv, in the folder's logs.
        save_weights: keep the trained weights of every run, in the folder's weights.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    claim: ClassVar[str]
    source: ClassVar[str]
    score: ClassVar[str] = "accuracy"
    shows_training: ClassVar[bool] = False  # in a column; its runs must measure "training batches"
    scales: ClassVar[Scales]

    scale: Scale | None = None
    data: str = "digits"
    data_root: Path = Path("data")
    classes: PositiveInt | None = None
    image_size: PositiveInt = 32
    model: str | None = None
    methods: tuple[MethodName, ...] = (
        "batch_norm", "batch_renorm", "ghost_batch_norm", "batch_group_norm", "batch_group_renorm"
    )  # fmt: skip
    seeds: PositiveInt = 3
    first_seed: NonNegativeInt = 0
    steps: PositiveInt = 1_000
    lr: PositiveFloat = 0.05
    momentum: OpenUnitInterval = 0.05
    augment: bool | None = None
    optimizer: Literal["sgd", "rmsprop"] = "sgd"
    schedule: Literal["cosine", "exponential"] = "cosine"
    weight_decay: NonNegativeFloat = 0.0
    norm_decay: Decay = "all"
    average: NonNegativeFloat = 0.0
    train_gamma: bool = True
    precision: Precision = "32-true"
    out: Path | None = None
    device: str = "cpu"
    workers: PositiveInt | None = None
    compile: bool = False
    checkpoint_every: PositiveInt = 500
    logger: LoggerName = "tensorboard"
    save_weights: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if getattr(self, name) is None and type(None) not in get_args(hint):  # jsonargparse lets it pass
                raise LabError(f"{name} must not be null")
            if "\0" in str(getattr(self, name)):
                raise LabError(f"{name} must not hold a null character, got {getattr(self, name)!r}")
        if not 0 <= self.average < 1:
            raise LabError(f"average must be at least 0 and less than 1, got {self.average}")
        if self.seeds > _MOST_SEEDS:
            raise LabError(f"seeds must be at most {_MOST_SEEDS:,}, the number of runs of a cell, got {self.seeds}")
        if self.first_seed + self.seeds > _LARGEST_SEED:
            raise LabError(f"first_seed must be less than 2**63, got {self.first_seed}")

    @abstractmethod
    def runs(self, dataset: Dataset) -> list[Run]:
        """The runs, in the order of the table: `make_run` for each regime, method and seed.

        Args:
            dataset: what will be trained on.

        Returns:
            The runs, each with a regime, method and seed of its own.
        """

    def conclusion(self, summary: Summary) -> str:
        """What the figures say, in a sentence.

        Args:
            summary: of the results.

        Returns:
            The sentence; empty for none.
        """
        return ""

    def load(self) -> Dataset:
        """What is trained on.

        Returns:
            The data set.

        Raises:
            LabError: it is not there, or something is wrong with it.
        """
        dataset = load_dataset(self.data, self.data_root, self.image_size)
        return dataset if self.classes is None else dataset.first_classes(self.classes)

    @property
    def seed_numbers(self) -> range:
        """The seeds of a cell of the table."""
        return range(self.first_seed, self.first_seed + self.seeds)

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
        **changes: Any,
    ) -> Run:
        """A run with the options that all recipes share.

        Args:
            dataset: what will be trained on.
            method: normalization method.
            label: row of the table; by default the method's own.
            examples_per_group: see `Run`, as for everything else; group norm and instance norm have
                always 1.
            **changes: other fields of `Run`.

        Returns:
            The run.

        Raises:
            LabError: the method is ghost batch norm, and nothing says how many examples share statistics.
        """
        if method == "ghost_batch_norm" and examples_per_group is None:
            raise LabError(
                f"methods of recipe {self.name} cannot be ghost_batch_norm, as no option says how many examples share "
                "its statistics: choose others, or the recipe ghost with --ghost-sizes"
            )
        if method in ("group_norm", "instance_norm"):
            examples_per_group = 1
        setting = METHODS[method]
        colour_32 = dataset.image_shape == (3, 32, 32)
        common: dict[str, Any] = {
            "recipe": self.name,
            "data": self.data,
            "model": self.model or ("mlp" if dataset_name(self.data) == "digits" else "resnet8"),
            "regime": regime,
            "method": label or setting.label,
            "tracking": setting.tracking,
            "limits": setting.limits,
            "r_max": setting.r_max,
            "d_max": setting.d_max,
            "example_weight": setting.example_weight,
            "examples_per_group": examples_per_group,
            "channels_per_group": setting.channels_per_group,
            "classes_per_batch": None,
            "examples_per_class": None,
            "batch_size": batch_size,
            "forward_size": None,
            "augment": colour_32 if self.augment is None else self.augment,
            "seed": seed,
        }
        shared = ("steps", "lr", "momentum", "optimizer", "schedule", "weight_decay", "norm_decay", "average",
                  "train_gamma", "precision")  # fmt: skip
        return Run(**(common | {name: getattr(self, name) for name in shared} | changes))


def check_rates(rates: Mapping[str, float], rows: Iterable[str]) -> None:
    """Make sure that learning rates of rows of a table are of rows that it has.

    Args:
        rates: learning rates by row.
        rows: the table's.

    Raises:
        LabError: there is no such row.
    """
    for name in rates.keys() - set(rows):
        raise LabError(f"rates must be of rows of the table ({'; '.join(rows)}), got {name}")
