"""The questions, and what the measurements answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log
from typing import Any, Literal, get_args

from ..layers import BatchGroupNorm, BatchNorm, BatchRenorm, GhostBatchNorm
from ..limits import Limits
from ..norm import Norm
from .advice import Evidence, Recommendation

Task = Literal["classification", "segmentation", "detection", "metric", "reinforcement", "gan", "federated"]

_ENOUGH = 16  # independent examples that share statistics, with which nothing gained on batch norm
_PAIR = 2
_NUM_GROUPS = 8
_CLOSER = 1.5, 0.5  # r_max, d_max
_BOUNDARIES = _PAIR + 1, _ENOUGH
_SHOWN = 2  # measurements
_NEAR = 2  # boundaries within this factor of the answers are named
_WEIGHING = (
    "Weighing costs 3 to 12% of the time in PyTorch. Exported, nothing folds into convolutions any more: in ONNX "
    "Runtime the network takes 1.2 to 3.1 times as long (docs/benchmarks.md)."
)
_DEPENDENT: dict[Task, bool] = {
    "classification": False, "segmentation": True, "detection": False, "metric": True, "reinforcement": True,
    "gan": True, "federated": True,
}  # fmt: skip


ENOUGH = Evidence(
    "results/microbatch-cifar20/results.csv", "n = 32", "20 classes of CIFAR-100 in 16 x 16", 32, 4_000,
    {"batch norm": 52.9, "batch norm, weighed": 52.8, "batch renorm": 52.1,
     "batch renorm, r to 1.5, d to 0.5": 52.3}, certain=False,
)  # fmt: skip
FOUR = Evidence(
    "results/microbatch-cifar20/results.csv", "n = 4", "20 classes of CIFAR-100 in 16 x 16", 4, 4_000,
    {"batch renorm, r to 1.5, d to 0.5": 49.9, "batch norm, weighed": 48.3, "batch renorm": 48.5,
     "batch norm": 47.7},
)  # fmt: skip
PAIR = Evidence(
    "results/microbatch-cifar20/results.csv", "n = 2", "20 classes of CIFAR-100 in 16 x 16", 2, 4_000,
    {"batch renorm, r to 1.5, d to 0.5": 45.4, "batch renorm, r to 1.5, d to 0.5, weighed": 45.9,
     "batch norm, weighed": 44.1, "batch renorm": 44.4, "batch norm": 40.7},
)  # fmt: skip
SINGLES = Evidence(
    "results/microbatch-digits/results.csv", "n = 2", "digits, a perceptron", 2, 1_000,
    {"batch-group norm": 97.6, "batch renorm": 80.4, "batch norm": 52.9},
)  # fmt: skip
SINGLES_PLAIN = Evidence(
    "results/microbatch-digits/results.csv", "n = 2", "digits, a perceptron", 2, 1_000,
    {"batch renorm": 80.4, "batch norm": 52.9},
)  # fmt: skip
SINGLES_FOUR = Evidence(
    "results/microbatch-digits/results.csv", "n = 4", "digits, a perceptron", 4, 1_000,
    {"batch norm": 97.6, "batch renorm": 97.6, "batch-group norm": 97.7}, certain=False,
)  # fmt: skip
WORKERS = Evidence(
    "results/workers-fashion/results.csv", "1 class each", "Fashion-MNIST in 14 x 14", 4, 800,
    {"batch norm, frozen for the last 50%": 84.6, "group norm": 83.4, "batch renorm, no limits": 81.2,
     "batch norm, weighed": 80.1, "batch norm": 10.5},
)  # fmt: skip
WORKERS_DIGITS = Evidence(
    "results/workers-digits/results.csv", "1 class each", "digits", 4, 600,
    {"batch norm, frozen for the last 50%": 97.9, "group norm": 97.7, "batch renorm, no limits": 98.1,
     "batch norm, weighed": 96.1, "batch norm": 49.4},
)  # fmt: skip
WORKERS_IMAGES = Evidence(
    "results/workers-cifar20/results.csv", "1 class each", "20 classes of CIFAR-100 in 16 x 16", 4, 6_400,
    {"group norm": 44.5, "batch norm, frozen for the last 50%": 41.1, "batch norm, weighed": 40.2,
     "batch renorm, no limits": 18.9, "batch norm": 7.5},
)  # fmt: skip
SYNCHRONIZED = Evidence(
    "results/workers-fashion/results.csv", "1 class each", "Fashion-MNIST in 14 x 14", 4, 800,
    {"batch norm, synchronized": 86.7, "batch norm, frozen for the last 50%": 84.6, "batch norm": 10.5},
)  # fmt: skip
TILES = Evidence(
    "results/tiles-digits/results.csv", "2 patches a batch", "scenes of digits, Dice", 2, 600,
    {"batch norm, frozen for the last 50%": 87.2, "batch renorm": 84.9, "batch norm": 84.7, "instance norm": 70.2,
     "group norm": 65.7},
)  # fmt: skip
TILE = Evidence(
    "results/tiles-digits/results.csv", "1 patch a batch", "scenes of digits, Dice", 1, 600,
    {"batch norm, frozen for the last 50%": 73.7, "batch norm, frozen for the last 10%": 75.4, "batch norm": 73.8,
     "instance norm": 70.1, "batch renorm": 66.4, "group norm": 66.1}, certain=False,
)  # fmt: skip
FINETUNED_8 = Evidence(
    "results/finetune-cifar100/results.csv", "batch size 8", "10 classes of CIFAR-100 in 16 x 16, fine-tuned", 8, 200,
    {"batch renorm, r to 1.5, d to 0.5": 40.6, "batch norm": 38.6, "batch renorm": 37.5,
     "batch norm, frozen": 33.5, "group norm": 27.1}, certain=False,
)  # fmt: skip
FINETUNED_4 = Evidence(
    "results/finetune-cifar100/results.csv", "batch size 4", "10 classes of CIFAR-100 in 16 x 16, fine-tuned", 4, 400,
    {"batch renorm, r to 1.5, d to 0.5": 40.3, "batch norm": 37.7, "batch renorm": 37.6,
     "batch norm, frozen": 34.5, "group norm": 27.3}, certain=False,
)  # fmt: skip
FINETUNED_2 = Evidence(
    "results/finetune-cifar100/results.csv", "batch size 2", "10 classes of CIFAR-100 in 16 x 16, fine-tuned", 2, 800,
    {"batch renorm": 39.0, "batch renorm, r to 1.5, d to 0.5": 37.7, "batch norm, frozen": 35.5,
     "batch norm": 33.1, "group norm": 28.8},
)  # fmt: skip
FINETUNED_1 = Evidence(
    "results/finetune-cifar100/results.csv", "batch size 1", "10 classes of CIFAR-100 in 16 x 16, fine-tuned", 1, 1_600,
    {"batch renorm": 35.2, "batch norm, frozen": 35.6, "group norm": 30.3,
     "batch renorm, r to 1.5, d to 0.5": 28.9, "batch norm": 11.2},
)  # fmt: skip
FEW_CLASSES = Evidence(
    "results/noniid-classes-cifar20/results.csv", "4 classes x 32", "20 classes of CIFAR-100 in 16 x 16", 128, 12_000,
    {"batch renorm": 59.3, "ghost batch norm, n = 8": 57.2, "batch norm, weighed": 54.5, "batch norm": 47.2},
)  # fmt: skip
METRIC = Evidence(
    "results/metric-omniglot/results.csv", "8 classes x 8", "Omniglot, recall@1", 64, 1_000,
    {"ghost batch norm, n = 16": 53.1, "batch norm": 48.9, "batch renorm": 37.7},
)  # fmt: skip
CROSSQ = Evidence(
    "examples/results/crossq.csv", "mean return", "Pendulum", 256, 6_000,
    {"batch renorm": -342.1, "batch norm": -443.5, "no norm": -922.7}, unit="", certain=False,
)  # fmt: skip
GAN = Evidence(
    "examples/results/gan.csv", "discriminator's accuracy over the last third", "digits", 32, 4_000,
    {"batch renorm": 76.3, "batch norm": 69.6}, certain=False,
)  # fmt: skip
FINETUNED = (FINETUNED_8, FINETUNED_4, FINETUNED_2, FINETUNED_1)


@dataclass(frozen=True)
class _Situation:
    batch_size: int
    total_steps: int
    dependent: bool
    independent_gradient: bool
    pretrained: bool
    positions: bool
    plain: bool
    can_synchronize: bool
    task: Task


def recommend(
    *,
    batch_size: int,
    total_steps: int,
    dependent: bool | None = None,
    independent_gradient: bool | None = None,
    pretrained: bool = False,
    positions: bool | None = None,
    plain: bool = False,
    can_synchronize: bool = False,
    task: Task = "classification",
) -> Recommendation:
    """The layer that measurements, and where there are none the papers, speak for.

    They were made with small networks; where much depends on it, compare on your own data. What is printed says how
    sure the advice is, which measured setting is nearest, what it costs, and what it would be on the other side of a
    boundary that lies within a factor of 2.

    Args:
        batch_size: examples that share statistics: those of one forward on one worker.
        total_steps: steps of the training.
        dependent: whether the examples that share statistics belong together, as by class, scene, patient, video or
            episode; by default what the task says.
        independent_gradient: whether a step's gradient is over independent examples all the same, as that of workers
            which each hold data of their own and average; by default only in federated training.
        pretrained: whether the training starts from a network that was trained with batch norm.
        positions: whether examples have several positions that share statistics, as images have; not so in
            perceptrons, whose input is (N, C), as in reinforcement learning by default.
        plain: whether the trained network must be plain nn.BatchNorm again, by `renorm.to_batchnorm`, to be folded,
            quantized or read by other programs.
        can_synchronize: whether workers can wait for each other in every layer; asked where the statistics depend on
            the batch and the gradient does not.
        task: classification, segmentation, detection, metric, reinforcement, gan or federated.

    Returns:
        The recommendation; its `apply` converts a model.

    Raises:
        ValueError: `batch_size` or `total_steps` is less than 1, or there is no such task.
        TypeError: an answer to a question is not True or False.

    Source:
        The CSV files that it names; Ioffe 2017, section 4; Summers & Dinneen 2020, sections 3 and 4.

    Example:
        >>> advice = recommend(batch_size=2, total_steps=5_000, pretrained=True)
        >>> print(advice.code)
        model = renorm.convert(
            model, renorm.BatchRenorm,
            limits=renorm.Limits.constant(),
        )
        >>> advice.otherwise
        ('From 3 examples on it would be: BatchRenorm, r to 1.5, d to 0.5.',)
    """
    for name, value in (("batch_size", batch_size), ("total_steps", total_steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if task not in get_args(Task):
        raise ValueError(f"task must be one of {', '.join(get_args(Task))}, got {task!r}")
    flags = {"dependent": _DEPENDENT[task] if dependent is None else dependent,
             "independent_gradient": task == "federated" if independent_gradient is None else independent_gradient,
             "pretrained": pretrained, "positions": task != "reinforcement" if positions is None else positions,
             "plain": plain, "can_synchronize": can_synchronize}  # fmt: skip
    for name, flag in flags.items():
        if flag not in (True, False):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    situation = _Situation(batch_size, total_steps, task=task, **flags)
    advice = _decide(situation)
    return replace(advice, otherwise=tuple(_beyond(situation, advice)))


def _decide(situation: _Situation) -> Recommendation:
    if situation.task in ("reinforcement", "gan"):
        return _several_forwards(situation)
    if situation.pretrained and (situation.dependent or situation.batch_size < _ENOUGH):
        return _fine_tuning(situation)
    return _dependent(situation) if situation.dependent else _independent(situation)


def _several_forwards(situation: _Situation) -> Recommendation:
    if situation.task == "gan":
        why = (
            "Real and fake batches go through the discriminator apart: put renorm.accumulate around its step and "
            "renorm.freeze around the generator's (docs/several-forwards.md). The discriminator that is left is then "
            "the one that trained; better images were not shown."
        )
        found = GAN
    else:
        why = (
            "Put values and targets through the critics in one forward, as CrossQ does, and act with the running "
            "statistics (docs/several-forwards.md). Batch renorm learned earlier than batch norm, and ended the same."
        )
        found = CROSSQ
    return _advice(situation, why, BatchRenorm, {"limits": Limits.over(situation.total_steps)}, (found,))


def _fine_tuning(situation: _Situation) -> Recommendation:
    closer = situation.batch_size > _PAIR
    limits = Limits.constant(*_CLOSER) if closer else Limits.constant()
    why = "Running statistics of the pretraining are good: corrected towards them, training begins as what it was."
    if situation.dependent:
        why += " Examples that depend on each other were not measured in fine-tuning."
    if situation.task == "detection":
        why += (
            " Frozen batch norm, the usual choice there, was behind in batches of 2 to 8; no detector was trained here."
        )
    return _advice(situation, why, BatchRenorm, {"limits": limits}, FINETUNED)


def _dependent(situation: _Situation) -> Recommendation:
    if situation.task == "segmentation":
        why = (
            "Tiles of a scene share what they show. Frozen to its running statistics at the end, batch norm agrees "
            "with itself from tile to tile, and learns what it is evaluated by."
        )
        return _advice(situation, why, BatchNorm, {}, (TILES, TILE), frozen_share=0.5)
    if situation.independent_gradient and situation.can_synchronize:
        why = "Statistics over all workers are independent again: that removes the cause."
        costs = (
            "Workers wait for each other in every layer: a step of two took 1.3 times as long (docs/benchmarks.md).",
        )
        return _advice(situation, why, BatchNorm, {"sync": "batch"}, (SYNCHRONIZED,), costs=costs)
    if situation.independent_gradient:
        why = (
            "Each worker's statistics tell what it holds, and a network learns to read them. Frozen to its running "
            "statistics at the end, it learns to do without. Until then evaluation says nothing: where it must be "
            "right all along, take BatchRenorm without limits, renorm.Limits.over(total_steps, math.inf, math.inf), at "
            "a learning rate several times as large; of many classes of natural images it learned little so, and group "
            "norm was ahead."
        )
        if situation.task == "federated":
            why += (
                " On the server merge the clients' state dicts by renorm.merge: it keeps how far their means lie "
                "apart, which an average of buffers loses."
            )
        return _advice(situation, why, BatchNorm, {}, (WORKERS, WORKERS_DIGITS, WORKERS_IMAGES), frozen_share=0.5)
    if situation.task == "metric":
        options = {"examples_per_group": _ENOUGH} if situation.batch_size >= _ENOUGH else {}
        layer = GhostBatchNorm if options else None
        why = "Embeddings of unseen classes were best with ghost batches of 16, and batch renorm was behind batch norm."
        return _advice(situation, why, layer, options, (METRIC,))
    why = (
        "The gradient depends on the batch's examples too, which no normalization mends; mix what can be mixed. In "
        "long trainings batch renorm was 12 points ahead of batch norm here, and 11 to 29 in the papers (Ioffe 2017, "
        "4.3; Summers & Dinneen 2020, table 1); in short ones here the two were level."
    )
    return _advice(situation, why, BatchRenorm, {"limits": Limits.over(situation.total_steps)}, (FEW_CLASSES,))


def _independent(situation: _Situation) -> Recommendation:
    if situation.batch_size >= _ENOUGH:
        why = "There is nothing to repair in independent batches of this size."
        return _advice(situation, why, None, {}, (ENOUGH,))
    if not situation.positions:
        return _few_numbers(situation)
    why = "So few examples leave batch norm little to go by; the correction wins a part of it back."
    limits = Limits.over(situation.total_steps, *_CLOSER)
    if situation.batch_size <= _PAIR:
        why += " Weighing gains half a point more, which is not certain."
    weigh = situation.batch_size <= _PAIR and not situation.plain
    return _advice(situation, why, BatchRenorm, {"limits": limits}, (PAIR, FOUR), weigh=weigh)


def _few_numbers(situation: _Situation) -> Recommendation:
    if situation.batch_size > _PAIR:
        why = "In a perceptron over 4 numbers no method lost anything."
        return _advice(situation, why, None, {}, (SINGLES_FOUR,))
    why = "A pair of numbers holds the sign of their difference alone"
    if situation.plain:
        why += "; the correction wins a part of it back. Without plain=True: several channels together."
        return _advice(situation, why, BatchRenorm, {"limits": Limits.over(situation.total_steps)}, (SINGLES_PLAIN,))
    why += ": take several channels together."
    return _advice(situation, why, BatchGroupNorm, {"num_groups": _NUM_GROUPS}, (SINGLES,))


def _advice(
    situation: _Situation,
    why: str,
    layer: type[Norm] | None,
    options: dict[str, Any],
    evidence: tuple[Evidence, ...],
    *,
    weigh: bool = False,
    frozen_share: float = 0.0,
    costs: tuple[str, ...] = (),
) -> Recommendation:
    nearest = tuple(sorted(evidence, key=lambda found: _distance(found, situation)))[:_SHOWN]
    return Recommendation(
        layer, options, weigh, why, _sure(layer, nearest[0], situation), nearest, situation.total_steps, frozen_share,
        costs + (_WEIGHING,) * weigh,
    )  # fmt: skip


def _distance(found: Evidence, situation: _Situation) -> float:
    size, steps = situation.batch_size / found.group_size, situation.total_steps / found.steps
    return 2 * abs(log(size)) + abs(log(steps))  # which says more of a setting is how many share statistics


def _sure(layer: type[Norm] | None, nearest: Evidence, situation: _Situation) -> str:
    recommended, best = next(iter(nearest.figures.values())), max(nearest.figures, key=nearest.figures.__getitem__)
    if layer is None:
        verdict = f"the best was {best}"
    elif recommended > nearest.figures["batch norm"]:
        verdict = f"it was ahead of batch norm{' for certain' if nearest.certain else ', but not for certain'}"
    else:
        verdict = "it was not ahead of batch norm"
    return (
        f"How sure: in the nearest setting that was measured {verdict}; that is {nearest.data}, {nearest.group_size} "
        f"examples that share statistics, {nearest.steps:,} steps (yours: {situation.batch_size:,} and "
        f"{situation.total_steps:,})."
    )


def _beyond(situation: _Situation, advice: Recommendation) -> Iterator[str]:
    """What would be recommended on the other side of the boundaries that lie near."""
    size = situation.batch_size
    for boundary in _BOUNDARIES:
        there = boundary if size < boundary else boundary - 1
        other = _decide(replace(situation, batch_size=there))
        if other.name != advice.name and 1 / _NEAR <= there / size <= _NEAR:
            side = f"From {boundary} examples on" if size < boundary else f"Below {boundary} examples"
            yield f"{side} it would be: {other.name}."
