"""Choosing the example weight of a trained model on validation data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert import convert
from ..layers import BatchNorm
from ..norm import Norm
from .passes import Forward, forward, modes
from .scores import ExampleScore, Interval, accuracy, bootstrap, cross_entropy

_METRICS: dict[str, tuple[ExampleScore, bool]] = {
    "accuracy": (accuracy, True),
    "cross_entropy": (cross_entropy, False),
}
_GRID = [round(0.1 * i, 1) for i in range(11)]
_PART = 8  # the grid sees one batch in so many, if there are enough
_LEAST_BATCHES = 2
_MOST_PASSES = 8
_STEP, _TOLERANCE = 0.1, 0.01
_GOLDEN = (3 - math.sqrt(5)) / 2


@dataclass(frozen=True)
class Point:
    """The score at an example weight.

    Args:
        alpha: the example weight.
        score: its mean over the examples and the mean's 95% confidence interval.
        examples: how many they were.
    """

    alpha: float
    score: Interval
    examples: int


@dataclass(frozen=True)
class Weighing:
    """What `weigh` found.

    Args:
        metric: name of the score.
        alpha: the example weight that the model has now.
        best: the example weight with the best score, which is not taken where its gain is within noise.
        gain: how much better it is than 0, on the same examples.
        curve: points on all examples, by alpha.
        grid: points on a part of the examples, by alpha.
        passes: evaluations of all examples that this took.
    """

    metric: str
    alpha: float
    best: float
    gain: Interval
    curve: tuple[Point, ...]
    grid: tuple[Point, ...]
    passes: float

    @property
    def is_noise(self) -> bool:
        """Whether the gain may be none, with 95% confidence."""
        return self.gain.low <= 0

    def __str__(self) -> str:
        rows = [f"{p.alpha:6.3f}  {p.score.mean:9.4f}  [{p.score.low:.4f}, {p.score.high:.4f}]" for p in self.curve]
        gain = f"{self.gain.mean:.4f} (95%: {self.gain.low:.4f} to {self.gain.high:.4f})"
        if self.best == 0:
            verdict = "no example weight is better than 0"
        elif self.is_noise:
            verdict = f"example_weight stays 0: {self.best:.3f} gains {gain}, within noise"
        else:
            verdict = f"example_weight = {self.alpha:.3f} gains {gain}"
        return "\n".join([f" alpha  {self.metric}, {self.curve[0].examples} examples", *rows, verdict])


def weigh(
    model: nn.Module,
    loader: Iterable[Any],
    metric: str | ExampleScore = "accuracy",
    *,
    higher_is_better: bool | None = None,
    forward: Forward = forward,
) -> Weighing:
    """Choose how much an example's own statistics weigh at evaluation, and set it in all norm layers, in place.

    Needs no training. Where running statistics describe the data badly (small or dependent batches in training,
    another distribution at evaluation) an example weight wins back a part of what is lost. A grid on a part of the
    data comes first, then a search by golden sections and parabolas on all of it (Brent's method), to within 0.01 on a
    smooth curve: at most 8 passes if there are 16 batches or more. A gain that may be none leaves the
    weight at 0. The interval of the gain is that of these examples, on which the weight was chosen: judge the result
    on others.

    Args:
        model: trained; torch's batch norm layers become `renorm.BatchNorm`, which load and save the same state.
        loader: validation data, passed over several times: batches of input and target, (x, target), or mappings with
            "label" or "labels".
        metric: "accuracy", "cross_entropy", or a function of the model's output and the target that gives a score of
            each example, (N,).
        higher_is_better: for a function of one's own.
        forward: called with model and batch; see `estimate`.

    Returns:
        The example weight, its gain and the curve.

    Raises:
        TypeError: a batch has no target.
        ValueError: the metric is unknown, the loader can be passed over only once or has no example, or there is no
            norm layer with running statistics.

    Source:
        Summers & Dinneen 2020, section 3.1.

    Example:
        >>> import renorm
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
        >>> batches = [(torch.randn(50, 1, 5, 5), torch.randint(2, (50,))) for _ in range(4)]
        >>> found = weigh(model, batches, "cross_entropy")
        >>> found.alpha == model[1].example_weight
        True
    """
    score, higher = _scoring(metric, higher_is_better)
    if iter(loader) is loader:
        raise ValueError("loader is passed over several times: give a DataLoader or a list, not an iterator")
    layers = _layers(model)
    before = [layer.example_weight for layer in layers]
    search = _Search(model, layers, loader, forward, score, higher)
    try:
        best = search.run()
        gain = bootstrap(search.sign * (search.full[best] - search.full[0.0]))
    except BaseException:
        for layer, weight in zip(layers, before, strict=True):
            layer.example_weight = weight
        raise
    chosen = best if gain.low > 0 else 0.0
    _set(layers, chosen)
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "score")
    curve, grid = _points(search.full), _points(search.part)
    return Weighing(name, chosen, best, gain, curve, grid, search.evaluated / len(search.full[0.0]))


class _Search:
    """Scores of examples by example weight, on a part and on all of the data."""

    def __init__(
        self, model: nn.Module, layers: list[Norm], loader: Iterable[Any], forward: Forward, score: ExampleScore,
        higher: bool,
    ) -> None:  # fmt: skip
        self.model, self.layers, self.loader, self.forward, self.score = model, layers, loader, forward, score
        self.sign = 1 if higher else -1
        self.part: dict[float, Tensor] = {}
        self.full: dict[float, Tensor] = {}
        self.evaluated = 0

    def run(self) -> float:
        """The best example weight, the smallest of equals."""
        self._on_all(0.0)
        for alpha in _GRID:
            self._on_part(alpha)
        self._on_all(self._best(self.part))
        while self.evaluated <= (_MOST_PASSES - 1) * len(self.full[0.0]):
            following = self._following()
            if following is None:
                break
            self._on_all(following)
        return self._best(self.full)

    def _following(self) -> float | None:
        """Where to look next: steps until the best lies between two others, then as Brent's method; None at its end.

        Brent's method takes the vertex of the parabola through the three, or else the golden section of the larger gap.
        """
        alphas = sorted(self.full)
        at = alphas.index(self._best(self.full))
        best = alphas[at]
        left = alphas[at - 1] if at > 0 else best
        right = alphas[at + 1] if at + 1 < len(alphas) else best
        if best > 0 and best - left > 1.5 * _STEP:
            return best - _STEP
        if best < 1 and (right == best or right - best > 1.5 * _STEP):
            return min(1.0, best + _STEP)
        vertex = self._vertex(left, best, right) if left < best < right else None
        if vertex is not None and abs(vertex - best) < _TOLERANCE / 2:
            return None
        if vertex is not None and left + _TOLERANCE / 2 < vertex < right - _TOLERANCE / 2:
            return vertex
        if max(best - left, right - best) <= 2 * _TOLERANCE:
            return None
        return best - _GOLDEN * (best - left) if best - left > right - best else best + _GOLDEN * (right - best)

    def _vertex(self, left: float, best: float, right: float) -> float | None:
        at_left, at_best, at_right = (self._on_all(alpha) for alpha in (left, best, right))
        rise, fall = (best - left) * (at_best - at_right), (best - right) * (at_best - at_left)
        if rise == fall:
            return None
        return best - ((best - left) * rise - (best - right) * fall) / (rise - fall) / 2

    def _best(self, scores: dict[float, Tensor]) -> float:
        return max(sorted(scores), key=lambda alpha: self.sign * float(scores[alpha].mean()))

    def _on_all(self, alpha: float) -> float:
        alpha = round(alpha, 4)
        if alpha not in self.full:
            self.full[alpha] = self._scores(alpha, 1)
        return self.sign * float(self.full[alpha].mean())

    def _on_part(self, alpha: float) -> None:
        self.part[alpha] = self._scores(alpha, self.stride)

    @property
    def stride(self) -> int:
        """One batch in so many is in the part."""
        return max(1, min(_PART, self.batches // _LEAST_BATCHES))

    def _scores(self, alpha: float, stride: int) -> Tensor:
        _set(self.layers, alpha)
        scores = []
        with torch.no_grad(), modes(self.model, set()):
            for number, batch in enumerate(self.loader):
                if number % stride == 0:
                    output = self.forward(self.model, batch)
                    scores.append(self._of_batch(output, batch))
        if stride == 1:
            self.batches = len(scores)
        if not scores or not sum(map(len, scores)):
            raise ValueError("loader has no example")
        found = torch.cat(scores)
        self.evaluated += len(found)
        return found

    def _of_batch(self, output: Any, batch: Any) -> Tensor:
        output = getattr(output, "logits", output)
        target = _target(batch)
        if isinstance(output, Tensor) and isinstance(target, Tensor):
            target = target.to(output.device)
        scores = self.score(output, target)
        if scores.ndim != 1:
            raise ValueError(f"metric must give a score of each example, (N,), got shape {tuple(scores.shape)}")
        return scores.detach().double().cpu()


def _scoring(metric: str | ExampleScore, higher_is_better: bool | None) -> tuple[ExampleScore, bool]:
    if isinstance(metric, str):
        if metric not in _METRICS:
            raise ValueError(f"metric must be one of {', '.join(map(repr, _METRICS))} or a function, got {metric!r}")
        return _METRICS[metric]
    if higher_is_better is None:
        raise ValueError("higher_is_better must be True or False for a metric of one's own, got None")
    return metric, higher_is_better


def _layers(model: nn.Module) -> list[Norm]:
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        converted = convert(model, BatchNorm, where=_tracks, report=lambda report: None)
        if converted is not model:
            raise ValueError("model must contain its norm layer: convert(model, renorm.BatchNorm) replaces it itself")
    layers = [module for module in model.modules() if isinstance(module, Norm) and module.track_running_stats]
    if not layers:
        raise ValueError("model has no norm layer with running statistics")
    return layers


def _tracks(name: str, module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _set(layers: list[Norm], alpha: float) -> None:
    for layer in layers:
        layer.example_weight = alpha


def _target(batch: Any) -> Any:
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    if isinstance(batch, dict):
        for name in ("labels", "label"):
            if name in batch:
                return batch[name]
    raise TypeError(
        "a batch must be (input, target) or a mapping with 'label' or 'labels', got "
        + (f"{type(batch).__name__} with {sorted(batch)}" if isinstance(batch, dict) else type(batch).__name__)
    )


def _points(scores: dict[float, Tensor]) -> tuple[Point, ...]:
    return tuple(Point(alpha, bootstrap(scores[alpha]), len(scores[alpha])) for alpha in sorted(scores))
