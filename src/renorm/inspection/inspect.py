"""Looking at what the norm layers of a model do on data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.passes import ModelCall, batch_statistics, forward, modes, target
from ..inference.scores import ExampleScore, Judge, Metric
from ..modules import tracking_layers
from .findings import find
from .measure import Measurement
from .records import ModeReport
from .report import Inspection

_SHUFFLED = 32  # batches among which examples are shuffled


def inspect(
    model: nn.Module,
    loader: Iterable[Any],
    metric: str | ExampleScore | Metric | None = "accuracy",
    *,
    higher_is_better: bool | None = None,
    loss: str | ExampleScore | None = "cross_entropy",
    forward: ModelCall = forward,
) -> Inspection:
    """Look for the difference between training and evaluation in a model's norm layers, and say what helps.

    One pass over the data, in three modes: evaluation; norm layers in training mode on the batches as the loader gives
    them (everything else, as dropout, as at evaluation); and that on the same examples, shuffled among 32 batches, or
    33 where one would be left alone. Tells for each layer how far the statistics of batches lie from the running ones,
    how dependent the batches are, what limits clip, by which the batch leaks into training, which channels are dead,
    and how far values reach; for the model the scores in each mode. Nothing of the model changes.

    Args:
        model: with layers of renorm, nn.BatchNorm or its subclasses.
        loader: batches of the size and the mix that the model was trained on; with targets, for scores: (x, target),
            or mappings with "label" or "labels". A few hundred examples in 20 batches will do.
        metric: as of `weigh`, or None.
        higher_is_better: for a function of one's own; by default as a torchmetrics metric says.
        loss: a second score, of which less is better: "cross_entropy", a function as `metric` may be, or None.
        forward: called with model and batch; see `estimate`.

    Returns:
        Reports of layers and modes, and findings; print it, `plot` it, write it `to_csv`.

    Raises:
        ValueError: the model has no layer with running statistics, or the loader no batch, or one of a single element
            for nn.BatchNorm; a metric is unknown, or does not suit outputs and targets.

    Source:
        Ioffe 2017, section 4.3: training-mode evaluation as the test for the trouble. Summers & Dinneen 2020, appendix
        A, for ranges.

    Example:
        >>> import renorm
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> batches = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(20)]
        >>> print(inspect(model, batches).findings[2])
        1: its running statistics have never been moved; try renorm.estimate(model, loader)
    """
    layers = tracking_layers(model)
    judges = [] if metric is None else [Judge(metric, higher_is_better)]
    judges += [] if loss is None else [Judge(loss, None if isinstance(loss, str) else False)]
    passes = _Modes(model, forward, judges, [Measurement(name, layer) for name, layer in layers.items()])
    chunk: list[Any] = []
    for batch in loader:
        if len(chunk) > _SHUFFLED:  # a batch more is there, so that none is left alone at the end
            passes.shuffled(chunk[:_SHUFFLED])
            del chunk[:_SHUFFLED]
        passes.measure(batch)
        chunk.append(batch)
    passes.shuffled(chunk)
    return passes.inspection()


class _Modes:
    """Scores in three modes, and measurements of layers in the first two."""

    def __init__(
        self, model: nn.Module, forward: ModelCall, judges: list[Judge], measurements: list[Measurement]
    ) -> None:
        self._model, self._forward, self._judges, self._measurements = model, forward, judges, measurements
        self._layers = [measurement.layer for measurement in measurements]
        self._scorings = {mode: [judge.start() for judge in judges] for mode in ("evaluation", "training", "shuffled")}
        self._batches = self._shuffled_batches = 0

    def measure(self, batch: Any) -> None:
        self._batches += 1
        if self._batches == 1 and not _has_target(batch):
            self._judges = []
        with torch.no_grad(), modes(self._model, set()), self._hooked("evaluation"):
            self._score("evaluation", batch)
        with batch_statistics(self._model, self._layers), self._hooked("training"):
            self._score("training", batch)

    def shuffled(self, batches: list[Any]) -> None:
        if not self._judges or len(batches) < 2:
            return
        mixed = _mixed(batches)
        self._shuffled_batches += len(mixed)
        with batch_statistics(self._model, self._layers):
            for batch in mixed:
                self._score("shuffled", batch)

    def inspection(self) -> Inspection:
        if self._batches == 0:
            raise ValueError("loader has no batch: it must give at least one (an iterator that is used up?)")
        layers = tuple(measurement.report() for measurement in self._measurements)
        scores = tuple(map(self._mode_report, range(len(self._judges))))
        return Inspection(layers, scores, find(layers, scores))

    def _score(self, mode: str, batch: Any) -> None:
        output = self._forward(self._model, batch)
        for scoring in self._scorings[mode] if self._judges else []:
            scoring.add(output, target(batch))

    def _mode_report(self, number: int) -> ModeReport:
        judge = self._judges[number]
        higher = judge.higher_is_better
        evaluation, training = (self._scorings[mode][number].evaluation(True) for mode in ("evaluation", "training"))
        report = ModeReport(
            judge.name, higher, evaluation.interval, training.interval, None, training.gain(evaluation, higher), None
        )
        if not self._shuffled_batches:
            return report
        shuffled = self._scorings["shuffled"][number].evaluation(True)
        if self._shuffled_batches < self._batches:
            return replace(report, shuffled=shuffled.interval)
        return replace(report, shuffled=shuffled.interval, composition=training.gain(shuffled, higher))

    @contextmanager
    def _hooked(self, mode: str) -> Iterator[None]:
        handles: list[Any] = []
        for measurement in self._measurements:
            if mode == "training":
                hook = measurement.in_training
                handles.append(measurement.layer.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(measurement.layer.register_forward_hook(measurement.in_evaluation, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _has_target(batch: Any) -> bool:
    try:
        target(batch)
    except TypeError:
        return False
    return True


def _mixed(batches: list[Any]) -> list[Any]:
    """The same examples in batches of the same sizes, shuffled with a fixed seed; none where they cannot be joined."""
    first = batches[0]
    if isinstance(first, Tensor):
        if first.ndim == 0 or any(batch.shape[1:] != first.shape[1:] for batch in batches):
            return []
        sizes = [len(batch) for batch in batches]
        order = torch.randperm(sum(sizes), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        return list(torch.cat(batches)[order.to(first.device)].split(sizes))
    names = list(first) if isinstance(first, Mapping) else range(len(first)) if isinstance(first, (tuple, list)) else []
    if any(not isinstance(batch[name], Tensor) for batch in batches for name in names):
        return []
    mixed = {name: _mixed([batch[name] for batch in batches]) for name in names}
    if not mixed or not all(mixed.values()):
        return []
    return [_with_parts(batch, {name: mixed[name][i] for name in names}) for i, batch in enumerate(batches)]


def _with_parts(batch: Any, parts: dict[Any, Any]) -> Any:
    """A batch of the same type, with other tensors."""
    if isinstance(batch, MutableMapping):
        other = copy.copy(batch)
        other.update(parts)
        return other
    if isinstance(batch, Mapping):
        return parts
    return type(batch)(*parts.values()) if hasattr(batch, "_fields") else type(batch)(parts.values())
