"""What one training is, and what it yields."""

from __future__ import annotations

from dataclasses import dataclass


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
        limits: whether batch renorm's correction applies, with `renorm.Limits.over(steps)`.
        examples_per_group: examples that share statistics; None for the whole minibatch.
        channels_per_group: channels that share statistics.
        classes_per_batch: classes in a minibatch; None for independent examples.
        examples_per_class: examples of each of these classes; None for independent examples.
        batch_size: examples in a minibatch.
        forward_size: examples in a forward pass, if the minibatch goes through the network in parts; None for all.
        steps: training steps, one gradient each.
        lr: learning rate at the start; it decays to 0 along a cosine.
        momentum: weight of a new minibatch in the running statistics.
        augment: whether training images are cropped and flipped at random.
        seed: of initialization, minibatches and augmentation.
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
