"""Choosing the example weight of a trained model on validation data, with labels or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..modules import replace_modules, tracking_layers
from ..norm import Norm
from .passes import ModelCall, batch_statistics, forward, modes, progress, renorm_layers, target
from .report import Point, Weighing
from .scores import Evaluation, ExampleScore, Judge, Metric, cross_entropy, predicted

# Of the search for the best weight in [0, 1].
_STEP, _TOLERANCE = 0.1, 0.01
_GOLDEN = (3 - math.sqrt(5)) / 2

Per = Literal["model", "stage", "layer"]

_GRID = [round(0.1 * i, 1) for i in range(11)]
_PART = 8  # the grid sees one batch in so many, if there are enough
_LEAST_BATCHES = 2
_MOST_PASSES = 8
_PASSES_PER_PART = 4

_TRAINING_MODE = "training_mode"  # the metric that needs no target


def weigh(
    model: nn.Module,
    loader: Iterable[Any],
    metric: str | ExampleScore | Metric = "accuracy",
    *,
    per: Per = "model",
    batch_size: int | None = None,
    higher_is_better: bool | None = None,
    forward: ModelCall = forward,
    show_progress: bool = True,
) -> Weighing:
    """Choose how much an example's own statistics weigh at evaluation, and set it in all norm layers, in place.

    Needs no training. Where running statistics describe the data badly (small or dependent batches in training,
    another distribution at evaluation) an example weight wins back a part of what is lost. A grid on a part of the
    data comes first, then a search by golden sections and parabolas on all of it (Brent's method), to within 0.01 on a
    smooth curve: at most 8 passes if there are 16 batches or more. A gain that may be none leaves the model as it
    was. The interval of the gain is that of these examples, on which the weight was chosen: judge the result on
    others.

    Without labels, "training_mode" takes for the right class the one that the model itself gives in training mode,
    where its layers normalize by the batch. So batches must be as in training, in size and mix: a worker's own, of its
    own classes, where each normalized by its own. Every batch is then forwarded twice in a pass. The gain is that in
    agreement: where training mode is itself often wrong, it need not be one in accuracy.

    Args:
        model: trained; torch's batch norm layers become `renorm.BatchNorm`, which load and save the same state.
            Subclasses of them stay as they are, with a warning. After an error everything is as it was.
        loader: validation data, passed over several times: batches of input and target, (x, target), or mappings with
            "label" or "labels"; for "training_mode" also inputs alone. In the same order each time, or the gain's
            interval gets wider than it is.
        metric: "accuracy", "cross_entropy", "training_mode" (see above), a function of the model's output and the
            target that gives a score of each example, (N,), or a torchmetrics metric of a single number, for which a
            pass's outputs are kept.
        per: "model" for one weight; "stage" or "layer" to go on from it with one for each part of the model that has
            norm layers (as a ResNet's layer1 to layer4) or for each layer, at 4 passes more for each. They are taken
            if their gain over the one weight is more than noise; with many layers and few examples it is chance.
        batch_size: consecutive examples that share statistics in "training_mode"; None for what the layers say, or
            else all of a batch.
        higher_is_better: for a function of one's own; by default as a torchmetrics metric says.
        forward: called with model and batch; see `estimate`.
        show_progress: whether to show a bar, where rich is installed and standard error is a terminal.

    Returns:
        The example weights, the gain and the curve.

    Raises:
        TypeError: a batch has no target.
        ValueError: the metric is unknown or does not suit outputs and targets, the loader can be passed over only once
            or has no example, there is no norm layer with running statistics, or `batch_size` is not for this metric
            or larger than a batch.

    Source:
        Summers & Dinneen 2020, section 3.1; with a weight for each layer, and by training mode instead of labels,
        EvalNorm (Singh & Shrivastava 2019), which compares normalized values where this compares classes.

    Example:
        >>> import renorm
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
        >>> batches = [(torch.randn(50, 1, 5, 5), torch.randint(2, (50,))) for _ in range(4)]
        >>> found = weigh(model, batches, "cross_entropy")
        >>> found.alpha == model[1].example_weight
        True
        >>> weigh(model, [x for x, _ in batches], "training_mode", batch_size=10).metric
        'training_mode'
    """
    judge = _checked(loader, metric, per, batch_size, higher_is_better)
    modules = dict(model.named_modules())
    layers = renorm_layers(model)
    parts = _parts(layers, per)
    before = [layer.example_weight for layer in layers.values()]
    try:
        right = _InTrainingMode(model, layers.values(), forward, batch_size) if _by_training_mode(metric) else target
        with progress("weighing", _MOST_PASSES + _PASSES_PER_PART * len(parts), show_progress) as show:
            return _weigh(layers, parts, _Passes(model, loader, forward, right, judge, show), judge)
    except BaseException:
        _restore(layers, before)
        replace_modules(model, {layer: modules[name] for name, layer in layers.items()})
        raise


def rehearse(model: nn.Module, loader: Iterable[Any], **options: Any) -> None:
    """Do to the first batch what `weigh` does to all of them, as far as that changes nothing.

    Args:
        model: evaluated; modes, layers and statistics are as they were at the end.
        loader: as of `weigh`.
        **options: of `weigh`; no bar is shown here.

    Raises:
        Exception: whatever `weigh` would end with.
    """
    call = signature(weigh).bind(model, loader, **options)
    call.apply_defaults()
    given = call.arguments
    metric, size, forward = given["metric"], given["batch_size"], given["forward"]
    judge = _checked(loader, metric, given["per"], size, given["higher_is_better"])
    layers = tracking_layers(model).values()
    right = _InTrainingMode(model, layers, forward, size) if _by_training_mode(metric) else target
    _Passes(model, islice(loader, 1), forward, right, judge, lambda done: None).evaluate()


def _by_training_mode(metric: str | ExampleScore | Metric) -> bool:
    return isinstance(metric, str) and metric == _TRAINING_MODE  # a torchmetrics metric has a == of its own


def _checked(
    loader: Iterable[Any], metric: str | ExampleScore | Metric, per: Per, batch_size: int | None, higher: bool | None
) -> Judge:
    judge = Judge(metric, higher, {_TRAINING_MODE: (cross_entropy, False)})
    if batch_size is not None and not _by_training_mode(metric):
        raise ValueError(
            f"batch_size must be None but for metric={_TRAINING_MODE!r}, which alone normalizes by batches, got "
            f"{batch_size!r} with {judge.name}"
        )
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size must be a whole number of at least 1, or None, got {batch_size!r}")
    if isinstance(loader, Iterator):
        raise ValueError("loader is passed over several times: give a DataLoader or a list, not an iterator")
    if per not in get_args(Per):
        raise ValueError(f"per must be one of {', '.join(map(repr, get_args(Per)))}, got {per!r}")
    return judge


def _weigh(layers: dict[str, Norm], parts: list[list[Norm]], passes: _Passes, judge: Judge) -> Weighing:
    before = [layer.example_weight for layer in layers.values()]
    as_it_was = passes.evaluate()
    full, part = _one_for_all(list(layers.values()), passes, as_it_was if set(before) == {0.0} else None)
    best = _best_of(passes.values(full))
    chosen, weights = full[best], [best] * len(layers)
    if parts:
        _restore(layers, weights)
        finer = _one_for_each(parts, passes, chosen)
        if finer.gain(chosen, judge.higher_is_better).low > 0:
            chosen, weights = finer, [layer.example_weight for layer in layers.values()]
    gain = chosen.gain(as_it_was, judge.higher_is_better)
    _restore(layers, weights if gain.low > 0 else before)
    alphas = {name: layer.example_weight for name, layer in layers.items()}
    return Weighing(judge.name, alphas, best, as_it_was.interval, gain, _points(full), _points(part), passes.number)


def _one_for_all(
    layers: list[Norm], passes: _Passes, at_zero: Evaluation | None
) -> tuple[dict[float, Evaluation], dict[float, Evaluation]]:
    """Evaluations on all and on a part of the data, by the example weight of all layers."""

    def at(alpha: float, stride: int = 1) -> Evaluation:
        _set(layers, alpha)
        return passes.evaluate(stride)

    full = {0.0: at_zero or at(0.0)}
    part = {alpha: at(alpha, passes.stride) for alpha in _GRID}
    following: float | None = _best_of(passes.values(part))
    while following is not None:
        if following not in full:
            full[following] = at(following)
        if passes.number > _MOST_PASSES - 1:
            break
        following = _next_place(passes.values(full))
    return full, part


def _one_for_each(parts: list[list[Norm]], passes: _Passes, start: Evaluation) -> Evaluation:
    """Search each part's example weight, the others staying as they are; set the best."""
    best = start
    for layers in parts:
        known = {layers[0].example_weight: best}
        for _ in range(_PASSES_PER_PART):
            following = _next_place(passes.values(known))
            if following is None:
                break
            _set(layers, following)
            known[following] = passes.evaluate()
        alpha = _best_of(passes.values(known))
        _set(layers, alpha)
        best = known[alpha]
    return best


class _Passes:
    """Evaluations of the model as it is at the time, and how many there were."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        forward: ModelCall,
        right: Callable[[Any], Any],
        judge: Judge,
        show: Callable[[float], None],
    ) -> None:
        self.number = 0.0
        self.stride = 1  # one batch in so many is in the grid's part
        self._model, self._loader, self._forward, self._judge, self._show = model, loader, forward, judge, show
        self._right = right
        self._batches, self._examples = 0, 0

    def evaluate(self, stride: int = 1) -> Evaluation:
        """Evaluate on one batch in `stride`."""
        scoring, batches = self._judge.start(), 0
        with torch.no_grad(), modes(self._model, set()):
            for batch in self._loader:
                if batches % stride == 0:
                    scoring.add(self._forward(self._model, batch), self._right(batch))
                batches += 1
                self._show(self.number + batches / self._batches / stride if self._batches else 0)
        # classes of training mode depend on the batch; a single one says nothing of how much
        found = scoring.evaluation(by_batch=self._right is not target and batches > stride)
        if not self._examples:
            self._batches, self._examples = batches, found.examples
            self.stride = max(1, min(_PART, batches // _LEAST_BATCHES))
        self.number += found.examples / self._examples
        return found

    def values(self, known: Mapping[float, Evaluation]) -> dict[float, float]:
        """Scores by example weight, higher being better."""
        sign = 1 if self._judge.higher_is_better else -1
        return {alpha: sign * evaluation.score for alpha, evaluation in known.items()}


class _InTrainingMode:
    """What a batch's target is without labels: the classes that the model gives where its layers normalize by it."""

    def __init__(
        self, model: nn.Module, layers: Iterable[nn.Module], forward: ModelCall, batch_size: int | None
    ) -> None:
        self._model, self._layers, self._forward, self._size = model, list(layers), forward, batch_size
        self._begun = False

    def __call__(self, batch: Any) -> Tensor:
        with batch_statistics(self._model, self._layers), self._sharing():
            classes = predicted(_TRAINING_MODE, self._forward(self._model, batch))
        if self._size is not None and self._size > len(classes) and not self._begun:
            raise ValueError(f"batch_size must be at most that of the loader's, {len(classes)}, got {self._size}")
        self._begun = True  # a last batch may be smaller
        return classes

    @contextmanager
    def _sharing(self) -> Iterator[None]:
        before = {layer: layer.grouping for layer in self._layers if isinstance(layer, Norm)}
        try:
            for layer, grouping in before.items() if self._size is not None else ():
                layer.grouping = replace(grouping, examples_per_group=self._size)
            yield
        finally:
            for layer, grouping in before.items():
                layer.grouping = grouping


def _parts(layers: dict[str, Norm], per: Per) -> list[list[Norm]]:
    """Layers that share an example weight; none for one weight of all."""
    if per == "model":
        return []
    if per == "layer":
        return [[layer] for layer in layers.values()]
    paths = [name.split(".") for name in layers]
    depth = 0  # of the first module that has layers in several of its children
    while len({tuple(path[: depth + 1]) for path in paths}) == 1 < len(paths):
        depth += 1
    parts: dict[str, list[Norm]] = {}
    for path, layer in zip(paths, layers.values(), strict=True):
        parts.setdefault(path[depth], []).append(layer)
    return list(parts.values())


def _set(layers: Iterable[Norm], alpha: float) -> None:
    for layer in layers:
        layer.example_weight = alpha


def _restore(layers: dict[str, Norm], weights: Iterable[float]) -> None:
    for layer, weight in zip(layers.values(), weights, strict=True):
        layer.example_weight = weight


def _points(found: Mapping[float, Evaluation]) -> tuple[Point, ...]:
    return tuple(Point(alpha, found[alpha].interval, found[alpha].examples) for alpha in sorted(found))


def _best_of(known: Mapping[float, float]) -> float:
    """Where the value is largest; of equals the smallest place.

    Args:
        known: value by place, at least one.

    Returns:
        The place.
    """
    return max(sorted(known), key=known.__getitem__)


def _next_place(known: Mapping[float, float]) -> float | None:
    """Where to look next: steps until the best lies between two others, then as Brent's method.

    That takes the vertex of the parabola through the three, or else the golden section of the larger gap.

    Args:
        known: value by place, at least one.

    Returns:
        The place, or None where the best is known to within 0.01 on a smooth curve.
    """
    places = sorted(known)
    best = _best_of(known)
    at = places.index(best)
    left = places[at - 1] if at > 0 else best
    right = places[at + 1] if at + 1 < len(places) else best
    if best > 0 and (left == best or best - left > 1.5 * _STEP):
        return round(max(0.0, best - _STEP), 4)
    if best < 1 and (right == best or right - best > 1.5 * _STEP):
        return round(min(1.0, best + _STEP), 4)
    following = _between(left, best, right, known)
    return None if following is None else round(following, 4)


def _between(left: float, best: float, right: float, known: Mapping[float, float]) -> float | None:
    vertex = _vertex(left, best, right, known) if left < best < right else None
    if vertex is not None and abs(vertex - best) < _TOLERANCE / 2:
        return None
    if vertex is not None and left + _TOLERANCE / 2 < vertex < right - _TOLERANCE / 2:
        return vertex
    if max(best - left, right - best) <= 2 * _TOLERANCE:
        return None
    return best - _GOLDEN * (best - left) if best - left > right - best else best + _GOLDEN * (right - best)


def _vertex(left: float, best: float, right: float, known: Mapping[float, float]) -> float | None:
    rise = (best - left) * (known[best] - known[right])
    fall = (best - right) * (known[best] - known[left])
    if rise == fall:
        return None
    return best - ((best - left) * rise - (best - right) * fall) / (rise - fall) / 2
