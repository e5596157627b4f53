"""What a model is judged by: a score for every example, or a metric over all of them, each with its uncertainty."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# From a model's output and the target to a score of each example, (N,).
ExampleScore = Callable[[Any, Any], Tensor]

_SCORE_RESAMPLES = 1_000
_METRIC_RESAMPLES = 200  # each computes the metric anew


@runtime_checkable
class Metric(Protocol):
    """A metric over all examples, as torchmetrics has them."""

    higher_is_better: bool | None

    def update(self, output: Any, target: Any) -> None:
        """Take in a batch."""

    def compute(self) -> Any:
        """The metric over what was taken in."""

    def reset(self) -> None:
        """Forget what was taken in."""


@dataclass(frozen=True)
class Interval:
    """A score, and where it lies with 95% confidence.

    Args:
        mean: over the examples.
        low: 2.5th percentile over resamples of the examples.
        high: 97.5th percentile.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A score over examples, and over resamples of them that are the same for equally many examples.

    Args:
        score: over the examples.
        replicates: over each resample, (R,), float64.
        examples: how many they are.
    """

    score: float
    replicates: Tensor
    examples: int

    @property
    def interval(self) -> Interval:
        """The score with its uncertainty."""
        return _interval(self.score, self.replicates)

    def gain(self, over: Evaluation, higher_is_better: bool) -> Interval:
        """How much better this is than another evaluation of the same examples in the same order.

        Args:
            over: the other.
            higher_is_better: or smaller.

        Returns:
            The difference with its uncertainty, which takes into account that the examples are the same.
        """
        sign = 1 if higher_is_better else -1
        return _interval(sign * (self.score - over.score), sign * (self.replicates - over.replicates))


class Judge:
    """Scores a model's outputs.

    Args:
        metric: "accuracy", "cross_entropy", a function of output and target that gives a score of each example, (N,),
            or a torchmetrics metric.
        higher_is_better: by default as the metric says; for a function it must be given.
        others: further scores that have a name, and whether higher is better.

    Raises:
        TypeError: the metric is none of these.
        ValueError: the name is unknown, or it is not known whether higher is better.
    """

    def __init__(
        self,
        metric: str | ExampleScore | Metric,
        higher_is_better: bool | None = None,
        others: Mapping[str, tuple[ExampleScore, bool]] = MappingProxyType({}),
    ) -> None:
        known: bool | None = None
        if isinstance(metric, str):
            named = {**_NAMED, **others}
            if metric not in named:
                names = ", ".join(map(repr, named))
                raise ValueError(f"metric must be one of {names}, a function or a torchmetrics metric, got {metric!r}")
            self.name = metric
            metric, known = named[metric]
        elif isinstance(metric, Metric):
            self.name, known = type(metric).__name__, metric.higher_is_better
        elif callable(metric):
            self.name = getattr(metric, "__name__", "score")
        else:
            raise TypeError(f"metric must be a name, a function or a torchmetrics metric, got {type(metric).__name__}")
        higher_is_better = known if higher_is_better is None else higher_is_better
        if higher_is_better is None:
            raise ValueError(f"higher_is_better must be True or False for {self.name}, got None")
        self.higher_is_better = higher_is_better
        self._metric = metric

    def start(self) -> Scoring:
        """Begin a pass over data.

        Returns:
            The pass's scoring, to be given its batches.
        """
        return _OfMetric(self._metric) if isinstance(self._metric, Metric) else _OfExamples(self._metric)


class Scoring(Protocol):
    """Scores of a pass."""

    def add(self, output: Any, target: Any) -> None:
        """Take in a batch.

        Args:
            output: of the model; a tensor, or an object with `logits`.
            target: as the loader gives it.
        """

    def evaluation(self, by_batch: bool = False) -> Evaluation:
        """What the batches make together.

        Args:
            by_batch: whether resamples are of whole batches: where an example's score depends on its batch.

        Returns:
            The score, with resamples.

        Raises:
            ValueError: there was no example.
        """


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Whether the class with the largest logit is the right one.

    Args:
        output: logits, (N, classes, *).
        target: classes, (N, *).

    Returns:
        1 where right, 0 elsewhere, (N,); the share of positions where there are any.

    Raises:
        TypeError: the output is no tensor.
        ValueError: the shapes are others.
    """
    _require_tensor("accuracy", output)
    _require_classes("accuracy", output, target, target.shape == output.shape[:1] + output.shape[2:])
    return _per_example((output.argmax(1) == target).double())


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in nats.

    Args:
        output: logits, (N, classes, *).
        target: classes, (N, *), or probabilities, (N, classes, *).

    Returns:
        Of each example, (N,); the mean over positions where there are any.

    Raises:
        TypeError: the output is no tensor.
        ValueError: there is no dimension of classes, or a single class.
    """
    _require_tensor("cross_entropy", output)
    _require_classes("cross_entropy", output, target)
    return _per_example(F.cross_entropy(output, target, reduction="none").double())


def predicted(name: str, output: Any) -> Tensor:
    """The class with the largest logit.

    Args:
        name: of the score that asks, for its errors.
        output: of the model: logits, (N, classes, *), or an object with `logits`.

    Returns:
        Classes, (N, *).

    Raises:
        TypeError: the output is no tensor.
        ValueError: there is no dimension of classes, or a single class.
    """
    output = getattr(output, "logits", output)
    _require_tensor(name, output)
    _require_classes(name, output, output)
    classes: Tensor = output.argmax(1)
    return classes


def _require_tensor(name: str, output: Any) -> None:
    if isinstance(output, Tensor):
        return
    of_mapping = isinstance(output, Mapping) and len(output) > 0
    place, keys = (repr(next(iter(output))), f" with {list(output)}") if of_mapping else ("0", "")
    raise TypeError(
        f"{name} is of a tensor, and the model returns {type(output).__name__}{keys}: give forward=..., as "
        f"forward=lambda model, batch: model(batch[0])[{place}]"
    )


def _require_classes(name: str, output: Tensor, target: Tensor, fits: bool = True) -> None:
    if output.ndim < 2 or output.shape[1] < 2 or not fits:
        raise ValueError(
            f"{name} is of logits (N, classes, *), two classes at least, and targets (N, *), got shapes "
            f"{tuple(output.shape)} and {tuple(target.shape)}: give another metric (inspect: metric=None, loss=None "
            "for none)"
        )


def bootstrap(sums: Tensor, sizes: Tensor) -> Evaluation:
    """A mean over examples, and over resamples of them or of batches with a fixed seed.

    Args:
        sums: of the scores of each example or batch, (B,), float64.
        sizes: how many examples those are, (B,), float64; not all 0.

    Returns:
        The evaluation.
    """
    means = [sums[drawn].sum() / sizes[drawn].sum() for drawn in _resamples(len(sums), _SCORE_RESAMPLES)]
    return Evaluation(float(sums.sum() / sizes.sum()), torch.stack(means), int(sizes.sum()))


def _per_example(scores: Tensor) -> Tensor:
    return scores.flatten(1).mean(1) if scores.ndim > 1 else scores


_NAMED: dict[str, tuple[ExampleScore, bool]] = {
    "accuracy": (accuracy, True),
    "cross_entropy": (cross_entropy, False),
}


class _OfExamples:
    def __init__(self, score: ExampleScore) -> None:
        self._score = score
        self._scores: list[Tensor] = []

    def add(self, output: Any, target: Any) -> None:
        output, target = _side_by_side(output, target)
        scores = self._score(output, target)
        if scores.ndim != 1:
            raise ValueError(f"metric must give a score of each example, (N,), got shape {tuple(scores.shape)}")
        self._scores.append(scores.detach().double().cpu())

    def evaluation(self, by_batch: bool = False) -> Evaluation:
        _check_examples(sum(map(len, self._scores)))
        if not by_batch:
            scores = torch.cat(self._scores)
            return bootstrap(scores, torch.ones_like(scores))
        sizes = torch.tensor([len(scores) for scores in self._scores], dtype=torch.float64, device="cpu")
        return bootstrap(torch.stack([scores.sum() for scores in self._scores]), sizes)


class _OfMetric:
    def __init__(self, metric: Metric) -> None:
        self._metric = copy.deepcopy(metric)
        self._outputs: list[Any] = []
        self._targets: list[Any] = []

    def add(self, output: Any, target: Any) -> None:
        output, target = _side_by_side(output, target)
        if isinstance(output, Mapping):  # which has no examples to be drawn
            _require_tensor(type(self._metric).__name__, output)
        self._outputs.append(output)
        self._targets.append(target)

    def evaluation(self, by_batch: bool = False) -> Evaluation:
        sizes = [len(output) for output in self._outputs]
        _check_examples(sum(sizes))
        outputs, targets = _joined(self._outputs), _joined(self._targets)
        if isinstance(self._metric, nn.Module) and isinstance(outputs, Tensor):
            self._metric.to(outputs.device)
        batches = torch.arange(len(outputs), device="cpu").split(sizes)
        replicates = []
        for drawn in _resamples(len(sizes) if by_batch else len(outputs), _METRIC_RESAMPLES):
            chosen = torch.cat([batches[i] for i in drawn.tolist()]) if by_batch else drawn
            replicates.append(self._of(_taken(outputs, chosen), _taken(targets, chosen)))
        scores = torch.tensor(replicates, dtype=torch.float64, device="cpu")
        return Evaluation(self._of(outputs, targets), scores, len(outputs))

    def _of(self, outputs: Any, targets: Any) -> float:
        self._metric.reset()
        self._metric.update(outputs, targets)
        value = self._metric.compute()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                f"metric must be a single number, got {value!r} from {type(self._metric).__name__} (average=None?)"
            )
        return float(value)


def _side_by_side(output: Any, target: Any) -> tuple[Any, Any]:
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor) and isinstance(target, Tensor):
        target = target.to(output.device)
    return output, target


def _check_examples(number: int) -> None:
    if number == 0:
        raise ValueError("loader has no example: it must give at least one batch (an iterator that is used up?)")


def _resamples(number: int, resamples: int) -> Iterator[Tensor]:
    """Indices, (number,), one resample after the other: all at once would be a thousand times the examples."""
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(resamples):
        yield torch.randint(number, (number,), generator=generator, device="cpu")


def _joined(batches: Sequence[Any]) -> Any:
    if isinstance(batches[0], Tensor):
        return torch.cat(list(batches))
    return [example for batch in batches for example in batch]


def _taken(examples: Any, chosen: Tensor) -> Any:
    if isinstance(examples, Tensor):
        return examples[chosen.to(examples.device)]
    return [examples[i] for i in chosen.tolist()]


def _interval(score: float, replicates: Tensor) -> Interval:
    at = torch.tensor([0.025, 0.975], dtype=torch.float64, device=replicates.device)
    low, high = torch.nanquantile(replicates, at).tolist()
    return Interval(score, low, high)
