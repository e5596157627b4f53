"""What one training is, and what it yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Order = Literal["shuffle", "class", "split"]
Decay = Literal["all", "none", "auto", "one"]
Precision = Literal["64-true", "32-true", "bf16-mixed"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training with everything that decides its result, apart from the data themselves.

    A recipe is a list of these. `regime`, `method` and `seed` together name a run within its recipe.

    Args:
        recipe: name of the recipe.
        data: what the recipe was given as --data.
        model: name of the network.
        regime: column of the table, such as "i.i.d.".
        method: row of the table, such as "batch norm".
        tracking: rule by which the running variance moves, of `renorm.Norm`.
        limits: whether batch renorm's correction applies, with the ramps of `renorm.Limits.over(steps)`.
        examples_per_group: examples that share statistics; None for the whole minibatch.
        channels_per_group: channels that share statistics.
        classes_per_batch: classes in a minibatch; None for independent examples.
        examples_per_class: examples of each of these classes; None for independent examples.
        batch_size: examples in a minibatch.
        forward_size: examples in a forward pass, if the minibatch goes through the network in parts; None for all.
        steps: training steps, one gradient each.
        lr: learning rate at the start.
        momentum: weight of a new minibatch in the running statistics.
        augment: whether training images are cropped and flipped at random.
        seed: of initialization, minibatches and augmentation.
        replacement: whether the classes of a minibatch are drawn with replacement.
        order: of the examples in a minibatch of few classes, as of `renorm.samplers.ClassBatchSampler`.
        example_weight: alpha of evaluations "off": 0, or 1 for group norm and instance norm, which know no
            other.
        r_max: limit of r once the ramp is over.
        d_max: limit of d once the ramp is over.
        plain_phase: length of the training's beginning without correction, as a multiple of the paper's.
        ramps: length of the ramps after it, as a multiple of the paper's.
        unclipped: layers without a bound on r and d after the plain phase: "none", "all", those "followed" by another
            norm layer on every path to the output, or those "exposed", of which a path leads there without one.
        train_gamma: whether gamma is trained; otherwise it stays 1.
        variant: name of a change to the layer itself, one of `variants.VARIANTS`; "" for none.
        optimizer: "sgd" with momentum 0.9, or "rmsprop" as TensorFlow has it.
        schedule: "cosine" to 0, or "exponential": times 0.94 after every two epochs.
        weight_decay: of all that is decayed.
        norm_decay: whether gamma and beta are decayed too: "all", "none", "auto" (where no norm layer follows), or
            "one" (all of them, gamma toward 1).
        frozen_share: share of the training, at its end, in which layers normalize by their running statistics, which no
            longer move.
        average: decay of the exponential moving average of weights and statistics that is evaluated; 0 for none.
        objective: "classification"; "metric": embeddings that lie close for examples of one class; "segmentation": a
            class for each pixel; or "regression".
        pretraining_steps: steps of plain batch norm on the data set's other classes before the training.
        pretrained: whether the training starts from the weights that timm or torchvision have for the model.
        measures: what else is measured at the end, names of `measures.MEASURES`, with a plus sign between them.
        precision: of the computation, one of Lightning Fabric's names.
    """

    recipe: str
    data: str
    model: str
    regime: str
    method: str
    tracking: str
    limits: bool
    examples_per_group: int | None
    channels_per_group: int
    classes_per_batch: int | None
    examples_per_class: int | None
    batch_size: int
    forward_size: int | None
    steps: int
    lr: float
    momentum: float
    augment: bool
    seed: int
    replacement: bool = False
    order: Order = "shuffle"
    example_weight: float = 0.0
    r_max: float = 3.0
    d_max: float = 5.0
    plain_phase: float = 1.0
    ramps: float = 1.0
    unclipped: str = "none"
    train_gamma: bool = True
    variant: str = ""
    optimizer: str = "sgd"
    schedule: str = "cosine"
    weight_decay: float = 0.0
    norm_decay: Decay = "all"
    frozen_share: float = 0.0
    average: float = 0.0
    objective: str = "classification"
    pretraining_steps: int = 0
    pretrained: bool = False
    measures: str = ""
    precision: Precision = "32-true"

    @property
    def key(self) -> tuple[str, str, int]:
        """Regime, method and seed: what tells a run from the others of its recipe."""
        return self.regime, self.method, self.seed

    def __str__(self) -> str:
        return f"{self.method}, {self.regime}, seed {self.seed}"


@dataclass(frozen=True)
class CurvePoint:
    """Where a training stands.

    Args:
        step: steps done.
        train_loss: cross-entropy in nats, mean over the steps since the point before.
        validation_accuracy: of the first validation examples, in [0, 1], without example weighing.
    """

    step: int
    train_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class Result:
    """How a finished run did; "off" is without and "on" with example weighing.

    Args:
        alpha: example weight with the best validation accuracy.
        validation_accuracy_off: in [0, 1].
        validation_accuracy_on: in [0, 1].
        test_accuracy_off: in [0, 1].
        test_accuracy_on: in [0, 1].
        test_loss_off: cross-entropy in nats.
        test_loss_on: cross-entropy in nats.
        seconds: of training and evaluation together.
        curve: points during training.
        measures: pairs of a name and a number, of what else the run measures.
        versions: pairs of a program and its version, of those that trained it.
    """

    alpha: float
    validation_accuracy_off: float
    validation_accuracy_on: float
    test_accuracy_off: float
    test_accuracy_on: float
    test_loss_off: float
    test_loss_on: float
    seconds: float
    curve: tuple[CurvePoint, ...]
    measures: tuple[tuple[str, float], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
