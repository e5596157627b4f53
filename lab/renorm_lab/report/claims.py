"""What the two papers measured and claim, as data.

P1 is "Batch Renormalization" (Ioffe 2017), P2 is "Four Things Everyone Should Know to Improve Batch Normalization"
(Summers and Dinneen 2020).
"""

from __future__ import annotations

from .kinds import ANY, Claim, Numbers, Setting, Spot

BN, BR, GHOST, GN, BGN = "batch norm", "batch renorm", "ghost batch norm", "group norm", "batch-group norm"

IMAGENET = Setting(
    name="Inception-v3 on ImageNet, 50 workers x 32 examples, 120,000 to 210,000 steps",
    run={
        "data": "imagenet", "model": "inception_v3", "batch_size": 1600, "forward_size": 32,
        "optimizer": "rmsprop", "train_gamma": False,
    },
    few_classes={"classes_per_batch": 16, "examples_per_class": 2},
    least_steps=120_000,
)  # fmt: skip
# P2 does not tell the length of its trainings; with fewer than 50 epochs of 40,000 images they are another setting.
CIFAR_100 = Setting(
    name="ResNet-18 on CIFAR-100, batches of 128",
    run={"data": "cifar100", "model": "resnet18", "batch_size": 128},
    few_classes={"classes_per_batch": 4, "examples_per_class": 32, "replacement": True},
    least_steps=15_000,
)
CIFAR_100_PAIRS = Setting(
    name="ResNet-18 on CIFAR-100, batches of 2, validation accuracy",
    run={"data": "cifar100", "model": "resnet18", "batch_size": 2},
    least_steps=960_000,
)
CALTECH_256 = Setting(name="Inception-v3 on Caltech-256", run={"data": "caltech256", "model": "inception_v3"})
FLOWERS_102 = Setting(
    name="pretrained ResNet-152 on Flowers-102",
    run={"data": "flowers102", "model": "resnet152", "pretrained": True},
)
RESNET_152 = Setting(name="trained ResNet-152 on ImageNet", run={"data": "imagenet", "model": "resnet152"})

IID = ("baseline", "noniid", "microbatch")
FEW_CLASSES = ("noniid", "noniid-classes")

_BY_BATCHES = Spot(BN, few_classes=True, measure="training-mode test accuracy, 25 classes x 2")
_PAIRS_SPLIT = Spot(BN, 16, few_classes=True, fields=(("order", "split"),))
P1 = Numbers(
    source="P1 4",
    recipes=IID,
    setting=IMAGENET,
    accuracies={
        Spot(BN): 78.3,
        Spot(BR): 78.5,
        Spot(BN, 4): 74.2,
        Spot(BR, 4): 76.5,
        Spot(BN, few_classes=True): 67.0,
        Spot(BR, few_classes=True): 78.5,
        _BY_BATCHES: 76.5,
        _PAIRS_SPLIT: 77.4,
    },
)

_TABLE_1 = {  # without and with example weighing
    (BN, None): (40.1, 62.2),
    (BR, None): (69.0, 69.0),
    (GHOST, 64): (42.3, 50.8),
    (GHOST, 32): (57.8, 70.9),
    (GHOST, 16): (64.3, 72.2),
    (GHOST, 8): (68.7, 72.0),
    (GHOST, 4): (70.4, 71.5),
    (GHOST, 2): (68.4, 71.4),
    (BGN, 2): (75.2, 76.1),
}
P2 = Numbers(
    source="P2 table 1",
    recipes=FEW_CLASSES,
    setting=CIFAR_100,
    accuracies={
        Spot(method, group, few_classes=True, weighed=weighed): accuracy
        for (method, group), pair in _TABLE_1.items()
        for weighed, accuracy in zip((False, True), pair, strict=True)
    },
)

_ALL_FOUR = Spot("all four", ANY, weighed=True)
P2_FLOWERS = Numbers(
    source="P2 4.3",
    recipes=("finetune",),
    setting=FLOWERS_102,
    accuracies={Spot(BN): 91.0, _ALL_FOUR: 93.4, Spot(GN, 1): 87.3},
)

NUMBERS = (P1, P2, P2_FLOWERS)


def _claim(
    numbers: Numbers, source: str, text: str, first: Spot, second: Spot, *, recipes: tuple[str, ...] = (),
    level: bool = False, any_group: bool = False, across: bool = False,
) -> Claim:  # fmt: skip
    """A claim whose difference stands in a paper's numbers."""
    return Claim(
        text=text, source=source, recipes=recipes or numbers.recipes, setting=numbers.setting, first=first,
        second=second, difference=round(numbers.accuracies[first] - numbers.accuracies[second], 2), level=level,
        any_group=any_group, across=across,
    )  # fmt: skip


def _few(method: str, group: int | None = None, *, weighed: bool = False) -> Spot:
    return Spot(method, group, few_classes=True, weighed=weighed)


_PAIRS = (("batch_size", 2),)
_RESIDUAL = ("resnet8", "resnet18", "resnet20", "torchvision/resnet50")
_PLAIN = ("plain8", "torchvision/inception_v3")


def _decayed(norm_decay: str, model: str) -> Spot:
    return Spot(BN, fields=(("norm_decay", norm_decay), ("model", model)))


CLAIMS = (
    _claim(P1, "P1 4.1", "On independent batches batch renorm is level with batch norm", Spot(BR), Spot(BN),
           level=True),
    _claim(P1, "P1 4.2", "With statistics over few examples batch renorm is better than batch norm", Spot(BR, 4),
           Spot(BN, 4), recipes=("microbatch",), any_group=True),
    _claim(P1, "P1 4.2", "Statistics over few examples cost batch norm accuracy", Spot(BN), Spot(BN, 4),
           recipes=("microbatch",), any_group=True, across=True),
    _claim(P1, "P1 4.2", "Larger groups are still better for batch renorm", Spot(BR), Spot(BR, 4),
           recipes=("microbatch",), any_group=True, across=True),
    _claim(P1, "P1 4.3", "Batches of few classes cost batch norm accuracy", Spot(BN), _few(BN),
           recipes=FEW_CLASSES, across=True),
    _claim(P1, "P1 4.3", "With few classes batch renorm is better than batch norm", _few(BR), _few(BN),
           recipes=FEW_CLASSES),
    _claim(P1, "P1 4.3", "Batch renorm loses nothing to few classes", _few(BR), Spot(BR), recipes=FEW_CLASSES,
           level=True, across=True),
    _claim(P1, "P1 4.3", "Batch norm trained on few classes is better evaluated in training mode",
           _BY_BATCHES, _few(BN)),
    _claim(P1, "P1 4.3", "Splitting pairs over half batches helps batch norm",
           _PAIRS_SPLIT, _few(BN)),
    Claim(text="Example weighing helps a trained network", source="P2 3.1", recipes=("weigh",), setting=RESNET_152,
          first=Spot(BN, weighed=True), second=Spot(BN), difference=0.6),
    Claim(text="Example weighing helps group norm too", source="P2 D", recipes=("weigh",), setting=RESNET_152,
          first=Spot(GN, 1, weighed=True), second=Spot(GN, 1)),
    Claim(text="Example weighing helps ghost batch norm", source="P2 3.2", recipes=("ghost",), setting=CIFAR_100,
          first=Spot(GHOST, 16, weighed=True), second=Spot(GHOST, 16), any_group=True),
    Claim(text="Ghost batch norm is better than batch norm", source="P2 3.2", recipes=(*IID, "ghost"),
          setting=CIFAR_100, first=Spot(GHOST, 16), second=Spot(BN), difference=0.84, any_group=True),
    *(Claim(text="Decay of gamma and beta helps a residual network", source="P2 3.3", recipes=("decay",),
            setting=CIFAR_100, first=_decayed("all", model), second=_decayed("none", model)) for model in _RESIDUAL),
    *(Claim(text="Decay of gamma toward 1 is level with decay toward 0", source="P2 3.3", recipes=("decay",),
            setting=CIFAR_100, first=_decayed("one", model), second=_decayed("all", model), level=True)
      for model in _RESIDUAL),
    *(Claim(text="Decay of gamma and beta harms a network without residual connections", source="P2 3.3",
            recipes=("decay",), setting=CALTECH_256, first=_decayed("none", model), second=_decayed("all", model))
      for model in _PLAIN),
    Claim(text="With batches of 2 batch-group norm is better than group norm", source="P2 3.4",
          recipes=("smallbatch",), setting=CIFAR_100_PAIRS, first=Spot(BGN, 2, weighed=True, fields=_PAIRS),
          second=Spot(GN, 1, weighed=True, fields=_PAIRS), difference=0.69),
    Claim(text="With statistics over 2 examples batch-group norm is better than batch norm", source="P2 3.4",
          recipes=("smallbatch", "microbatch"), setting=CIFAR_100_PAIRS, first=Spot(BGN, 2), second=Spot(BN, 2)),
    Claim(text="All four together are better than batch norm", source="P2 4.2", recipes=("allfour",),
          setting=CALTECH_256, first=_ALL_FOUR, second=Spot(BN), difference=6.5),
    Claim(text="All four together are better than group norm", source="P2 4.2", recipes=("allfour",),
          setting=CALTECH_256, first=_ALL_FOUR, second=Spot(GN, 1), difference=5.9),
    _claim(P2_FLOWERS, "P2 4.3", "Fine-tuned with all four is better than with batch norm", _ALL_FOUR, Spot(BN)),
    _claim(P2_FLOWERS, "P2 4.3", "Fine-tuned with all four is better than with group norm", _ALL_FOUR, Spot(GN, 1)),
    _claim(P2, "P2 4.4", "With few classes example weighing helps batch norm", _few(BN, weighed=True), _few(BN)),
    _claim(P2, "P2 4.4", "With few classes example weighing changes nothing for batch renorm",
           _few(BR, weighed=True), _few(BR), level=True),
    *(_claim(P2, "P2 4.4", "With few classes ghost batch norm is better than batch norm",
             _few(GHOST, size), _few(BN)) for size in (64, 32, 16, 8, 4, 2)),
    *(_claim(P2, "P2 4.4", "With few classes example weighing helps ghost batch norm",
             _few(GHOST, size, weighed=True), _few(GHOST, size)) for size in (64, 32, 16, 8, 4, 2)),
    _claim(P2, "P2 4.4", "With few classes batch-group norm is better than batch norm", _few(BGN, 2), _few(BN)),
    _claim(P2, "P2 4.4", "With few classes batch-group norm is better than batch renorm", _few(BGN, 2), _few(BR)),
    Claim(text="Batch-group norm loses hardly anything to few classes", source="P2 4.4", recipes=FEW_CLASSES,
          setting=CIFAR_100, first=_few(BGN, 2), second=Spot(BGN, 2), level=True, across=True),
    Claim(text="Running statistics estimated anew from images that are not augmented cost accuracy", source="P2 C",
          recipes=("negative",), setting=CIFAR_100, first=Spot(BN),
          second=Spot(BN, measure="test accuracy, statistics of training images, not augmented"), difference=0.5),
)  # fmt: skip
