"""Looking at what the norm layers of a model do on data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.passes import Forward, batch_statistics, forward, modes, target, tracking_layers
from ..inference.scores import ExampleScore, Judge, Metric
from .findings import find
from .measure import Measurement
from .report import Inspection, ModeReport

_SHUFFLED = 32  # batches among which examples are shuffled


def inspect(
    model: nn.Module,
    loader: Iterable[Any],
    metric: str | ExampleScore | Metric | None = "accuracy",
    *,
    higher_is_better: bool | None = None,
    loss: str | ExampleScore | None = "cross_entropy",
    forward: Forward = forward,
) -> Inspection:
    """Look for the difference between training and evaluation in a model's norm layers, and say what helps.

    One pass over the data, in three modes: evaluation; norm layers in training mode on the batches as the loader gives
    them (everything else, as dropout, as at evaluation); and that on the same examples, shuffled among 32 batches.
    Tells for each layer how far the statistics of batches lie from the running ones, how dependent the batches are,
    what limits would clip, which channels are dead, and how far values reach; for the model the scores in each mode.
    Nothing of the model changes.

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
        ValueError: the model has no layer with running statistics, or the loader no batch; a metric is unknown.

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
    passes = _Passes(model, forward, judges, [Measurement(name, layer) for name, layer in layers.items()])
    chunk: list[Any] = []
    for batch in loader:
        passes.measure(batch)
        chunk.append(batch)
        if len(chunk) == _SHUFFLED:
            passes.shuffled(chunk)
            chunk = []
    passes.shuffled(chunk)
    return passes.inspection()


class _Passes:
    """Scores in three modes, and measurements of layers in the first two."""

    def __init__(
        self, model: nn.Module, forward: Forward, judges: list[Judge], measurements: list[Measurement]
    ) -> None:
        self.model, self.forward, self.judges, self.measurements = model, forward, judges, measurements
        self.layers = [measurement.layer for measurement in measurements]
        self.scorings = {mode: [judge.start() for judge in judges] for mode in ("evaluation", "training", "shuffled")}
        self.batches = self.shuffled_batches = 0

    def measure(self, batch: Any) -> None:
        self.batches += 1
        if self.batches == 1 and not _has_target(batch):
            self.judges = []
        with torch.no_grad(), modes(self.model, set()), self._hooked("evaluation"):
            self._score("evaluation", batch)
        with batch_statistics(self.model, self.layers), self._hooked("training"):
            self._score("training", batch)

    def shuffled(self, batches: list[Any]) -> None:
        if not self.judges or len(batches) < 2:
            return
        mixed = _mixed(batches)
        self.shuffled_batches += len(mixed)
        with batch_statistics(self.model, self.layers):
            for batch in mixed:
                self._score("shuffled", batch)

    def inspection(self) -> Inspection:
        if self.batches == 0:
            raise ValueError("loader has no batch")
        layers = tuple(measurement.report() for measurement in self.measurements)
        modes = tuple(map(self._mode_report, range(len(self.judges))))
        return Inspection(layers, modes, find(layers, modes))

    def _score(self, mode: str, batch: Any) -> None:
        output = self.forward(self.model, batch)
        for scoring in self.scorings[mode] if self.judges else []:
            scoring.add(output, target(batch))

    def _mode_report(self, number: int) -> ModeReport:
        judge = self.judges[number]
        higher = judge.higher_is_better
        evaluation, training = (self.scorings[mode][number].evaluation(True) for mode in ("evaluation", "training"))
        report = ModeReport(
            judge.name, higher, evaluation.interval, training.interval, None, training.gain(evaluation, higher), None
        )
        if not self.shuffled_batches:
            return report
        shuffled = self.scorings["shuffled"][number].evaluation(True)
        if self.shuffled_batches < self.batches:
            return replace(report, shuffled=shuffled.interval)
        return replace(report, shuffled=shuffled.interval, composition=training.gain(shuffled, higher))

    @contextmanager
    def _hooked(self, mode: str) -> Iterator[None]:
        handles: list[Any] = []
        for measurement in self.measurements:
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
        order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))
        return list(torch.cat(batches)[order.to(first.device)].split(sizes))
    names = list(first) if isinstance(first, Mapping) else range(len(first)) if isinstance(first, (tuple, list)) else []
    if any(not isinstance(batch[name], Tensor) for batch in batches for name in names):
        return []
    mixed = {name: _mixed([batch[name] for batch in batches]) for name in names}
    if not mixed or not all(mixed.values()):
        return []
    if isinstance(first, Mapping):
        return [{name: mixed[name][i] for name in names} for i in range(len(batches))]
    return [tuple(mixed[name][i] for name in names) for i in range(len(batches))]
