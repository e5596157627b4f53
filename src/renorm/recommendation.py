"""Which layer for which training, with the measurements that speak for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from textwrap import fill
from typing import Any

from torch import nn

from .conversion.convert import convert
from .layers import BatchGroupNorm, BatchRenorm
from .limits import Limits
from .markup import bullets
from .norm import Norm

_ENOUGH = 16  # independent examples that share statistics, with which nothing gained on batch norm
_PAIR = 2
_SHORT = 10_000  # steps, in which the correction gained on batch norm for sure over pairs alone
_LIKE_THE_PAPER = 60_000  # steps: from here on nearer to its 130,000 than to the longest training here, of 32,000
_CLOSE = 1.5, 0.5  # r_max, d_max
_NUM_GROUPS = 8
_LITTLE = "So few examples leave batch norm little to go by; the correction wins a part of it back."
_WIDTH = 76  # of printed lines


@dataclass(frozen=True)
class Evidence:
    """Test accuracies that were measured.

    Args:
        file: CSV file in the repository.
        setting: which of its rows.
        accuracies: mean over three seeds by method, in %.
    """

    file: str
    setting: str
    accuracies: dict[str, float]

    def __str__(self) -> str:
        figures = "; ".join(f"{method}: {accuracy:.1f}%" for method, accuracy in self.accuracies.items())
        lines = fill(figures, _WIDTH, initial_indent="  ", subsequent_indent="  ")
        return f"{self.file}, {self.setting}:\n{lines}"


FINETUNING = Evidence(
    "examples/results/finetune.csv", "batches of 2", {"batch renorm": 23.7, "frozen": 21.1, "batch norm": 15.0}
)
FEW_CLASSES = Evidence(
    "results/noniid-classes-cifar100/results.csv", "16 classes x 4",
    {"batch norm": 23.8, "batch renorm": 23.6, "ghost batch norm, n = 16": 22.7},
)  # fmt: skip
METRIC = Evidence(
    "results/metric-omniglot/results.csv", "8 classes x 8",
    {"ghost batch norm, n = 16": 53.1, "batch norm": 48.9, "batch renorm": 37.7},
)  # fmt: skip
ENOUGH = Evidence(
    "results/microbatch-cifar100/results.csv", "n = 32",
    {"batch norm, weighed": 16.8, "batch norm": 16.4, "batch renorm": 14.9},
)  # fmt: skip
FOUR = Evidence(
    "results/microbatch-cifar100/results.csv", "n = 4",
    {"batch norm, weighed": 15.7, "batch renorm": 14.2, "batch norm": 13.8},
)  # fmt: skip
PAIR = Evidence(
    "results/microbatch-cifar100/results.csv", "n = 2",
    {"batch renorm": 12.1, "batch norm, weighed": 12.0, "batch norm": 9.1},
)  # fmt: skip
CLOSE = Evidence(
    "results/combination-cifar100/results.csv", "batch size 2",
    {"batch renorm, r to 1.5, d to 0.5, weighed": 14.9, "batch renorm, r to 1.5, d to 0.5": 13.7,
     "batch norm, weighed": 12.8, "batch renorm": 12.4, "batch norm": 10.1},
)  # fmt: skip
CLOSE_FOUR = Evidence(
    "results/allfour-cifar100/results.csv", "batch size 4",
    {"batch renorm, r to 1.5, d to 0.5, weighed": 14.7, "batch norm, weighed": 14.4,
     "batch renorm, r to 1.5, d to 0.5": 14.2, "batch renorm": 13.3, "batch norm": 13.1},
)  # fmt: skip
PAIR_OF_SINGLES = Evidence(
    "results/microbatch-digits/results.csv", "n = 2",
    {"batch-group norm": 97.6, "batch renorm": 80.4, "batch norm": 52.9},
)  # fmt: skip


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` returns; prints as code and reasons.

    Args:
        layer: what to convert batch norm layers to; None to leave them as they are.
        options: of `renorm.convert`.
        weigh: whether to choose the example weight with `renorm.weigh` once the model is trained.
        why: the reason.
        evidence: measurements behind it.
    """

    layer: type[Norm] | None
    options: dict[str, Any]
    weigh: bool
    why: str
    evidence: tuple[Evidence, ...]

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert a model's batch norm layers, in place, as `renorm.convert` does.

        Args:
            model: not yet wrapped in DDP or FSDP nor compiled.

        Returns:
            The model.
        """
        return model if self.layer is None else convert(model, self.layer, **self.options)

    def __str__(self) -> str:
        return "\n".join([self._what(), fill(self.why, _WIDTH), *(f"- {evidence}" for evidence in self.evidence)])

    def _repr_html_(self) -> str:
        evidence = bullets(" ".join(str(evidence).split()) for evidence in self.evidence)
        return f"<pre>{escape(self._what())}</pre><p>{escape(self.why)}</p>{evidence}"

    def _what(self) -> str:
        weighing = "\nrenorm.weigh(model, validation)  # once it is trained" if self.weigh else ""
        return self._conversion() + weighing

    def _conversion(self) -> str:
        if self.layer is None:
            return "keep nn.BatchNorm"
        options = "".join(f"\n    {name}={_code(value)}," for name, value in self.options.items())
        return f"model = renorm.convert(\n    model, renorm.{self.layer.__name__},{options}\n)"


def recommend(
    *,
    batch_size: int,
    total_steps: int,
    dependent: bool = False,
    pretrained: bool = False,
    positions: bool = True,
    plain: bool = False,
) -> Recommendation:
    """The layer that measurements, and where there are none the papers, speak for.

    They were made with small networks and short trainings; where much depends on it, compare on your own data.

    Args:
        batch_size: examples that are normalized together: those of one forward on one worker.
        total_steps: steps of the training.
        dependent: whether the examples of a batch belong together, as by class, scene, video or episode.
        pretrained: whether the training starts from a network that was trained with batch norm.
        positions: whether examples have several positions that share statistics, as images have; not so in
            perceptrons, whose input is (N, C).
        plain: whether the trained network must be plain nn.BatchNorm again, by `renorm.to_batchnorm`, to be folded,
            quantized or read by other programs.

    Returns:
        The recommendation; its `apply` converts a model.

    Raises:
        ValueError: `batch_size` or `total_steps` is less than 1.
        TypeError: an answer to a question is not True or False.

    Source:
        The CSV files that it names; Ioffe 2017, section 4; Summers & Dinneen 2020, sections 3 and 4.

    Example:
        >>> print(recommend(batch_size=2, total_steps=5_000, pretrained=True))
        model = renorm.convert(
            model, renorm.BatchRenorm,
            limits=renorm.Limits.constant(),
        )
        Running statistics of the pretraining are good: corrected towards them,
        training begins as what it was.
        - examples/results/finetune.csv, batches of 2:
          batch renorm: 23.7%; frozen: 21.1%; batch norm: 15.0%
    """
    for name, value in (("batch_size", batch_size), ("total_steps", total_steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    flags = {"dependent": dependent, "pretrained": pretrained, "positions": positions, "plain": plain}
    for name, flag in flags.items():
        if flag not in (True, False):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if batch_size >= _ENOUGH and not dependent:
        why = "There is nothing to repair in independent batches of this size."
        return Recommendation(None, {}, not plain, why, (ENOUGH,))
    if pretrained:
        options: dict[str, Any] = {"limits": Limits.constant()}
        why = "Running statistics of the pretraining are good: corrected towards them, training begins as what it was."
        return Recommendation(BatchRenorm, options, False, why, (FINETUNING,))
    if dependent and (total_steps >= _SHORT or batch_size > _PAIR):
        return _dependent(batch_size, total_steps, plain)
    if batch_size > _PAIR:
        return _few(total_steps, plain)
    if positions:
        return _pair(total_steps, plain)
    if plain:
        return Recommendation(BatchRenorm, {"limits": Limits.over(total_steps)}, False, _LITTLE, (PAIR_OF_SINGLES,))
    why = "A pair of numbers holds the sign of their difference alone: take several channels together."
    return Recommendation(BatchGroupNorm, {"num_groups": _NUM_GROUPS}, False, why, (PAIR_OF_SINGLES,))


def _dependent(batch_size: int, total_steps: int, plain: bool) -> Recommendation:
    if total_steps >= _SHORT:
        why = (
            "On ImageNet, in 130,000 steps, it lost nothing to batches of few classes, where batch norm lost 11 points "
            "(Ioffe 2017, 4.3)."
        )
        return Recommendation(BatchRenorm, _corrected(total_steps), False, why, (FEW_CLASSES,))
    why = "In short trainings batch renorm was nowhere ahead of batch norm for sure, and in metric learning behind"
    why += "; ghost batches were ahead there: try GhostBatchNorm." if batch_size > _ENOUGH else "."
    return Recommendation(None, {}, not plain, why, (FEW_CLASSES, METRIC))


def _pair(total_steps: int, plain: bool) -> Recommendation:
    if total_steps >= _LIKE_THE_PAPER:
        return Recommendation(BatchRenorm, _corrected(total_steps), not plain, _LITTLE, (PAIR,))
    weighing = "." if plain else ", and weighing gains on top."
    why = f"{_LITTLE} Closer limits than the paper's win more{weighing}"
    return Recommendation(BatchRenorm, _corrected(total_steps), not plain, why, (CLOSE, PAIR))


def _few(total_steps: int, plain: bool) -> Recommendation:
    if total_steps < _SHORT:
        why = "In a short training the correction gained nothing for sure"
        why += "." if plain else ", and less than weighing does, which needs no other training."
        return Recommendation(None, {}, not plain, why, (FOUR,))
    why = "On ImageNet, over 4 examples in 130,000 steps, it had 76.5%, where batch norm had 74.2 (Ioffe 2017, 4.2)"
    why += "; here, in 16,000, closer limits than the paper's did best." if total_steps < _LIKE_THE_PAPER else "."
    return Recommendation(BatchRenorm, _corrected(total_steps), not plain, why, (CLOSE_FOUR,))


def _corrected(total_steps: int) -> dict[str, Any]:
    """Closer limits than the paper's for trainings that are shorter by far; `convert` takes the momentum from them."""
    ends = () if total_steps >= _LIKE_THE_PAPER else _CLOSE
    return {"limits": Limits.over(total_steps, *ends)}


def _code(value: object) -> str:
    if not isinstance(value, Limits):
        return repr(value)
    if value == Limits.constant():
        return "renorm.Limits.constant()"
    arguments = ", ".join(f"{name}={number:g}" for name, number in asdict(value).items())
    return f"renorm.Limits(\n        {arguments}\n    )"
