"""From an inspection's numbers to what they mean and what helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..inference.scores import Interval
from .records import Finding, LayerReport, ModeReport

_LEAST_GAP = {"accuracy": 0.005, "cross_entropy": 1e-4}  # from where on one is worth a sentence; less is rounding
_ENOUGH_ELEMENTS = 4  # with which batch norm learned digits as well as with more; with 2 it did not
_NOTHING = (
    "running statistics describe the batches, and no batch depends on what it is made of: nothing much is to be gained "
    "at evaluation"
)
_GETS_ALONG = "batches differ from the running statistics, and evaluation loses nothing by it"


def find(layers: Sequence[LayerReport], modes: Sequence[ModeReport]) -> tuple[Finding, ...]:
    """Say what the numbers mean.

    Args:
        layers: reports of the layers.
        modes: reports of the scores; empty where the loader has no targets.

    Returns:
        The findings: of the model, then of its layers.
    """
    causes = list(filter(None, _causes(layers)))  # why evaluation loses, where it does
    told = causes if not modes or any(map(_may_lose, modes)) else []
    found = [*_of_modes(modes, any(layer.corrected for layer in layers)), *filter(None, _of_layers(layers, told))]
    if any(finding.layer is not None for finding in found) or any(map(_is_telling, modes)):
        return tuple(found)
    return (*found, Finding(None, "none", 0.0, _GETS_ALONG if causes else _NOTHING))


def _may_lose(mode: ModeReport) -> bool:
    """Whether evaluation may be worse than training mode; NaN may."""
    return not (mode.gap.high < 0 or mode.gap.mean < _LEAST_GAP.get(mode.metric, 0))


def _is_telling(mode: ModeReport) -> bool:
    """Whether a score shows that something is wrong, or nothing at all."""
    composition = mode.composition
    dependent = composition is not None and (composition.high < 0 or _is_sure(composition, mode.metric))
    return dependent or _is_sure(mode.gap, mode.metric) or not math.isfinite(mode.gap.mean)


def _is_sure(gap: Interval, metric: str) -> bool:
    """Whether a score is better for sure, and by enough; NaN is not."""
    return gap.low > 0 and gap.mean >= _LEAST_GAP.get(metric, 0)


def _of_modes(modes: Sequence[ModeReport], corrected: bool) -> list[Finding]:
    return [*map(_gap, modes), *filter(None, (_composition(mode, corrected) for mode in modes))]


def _gap(mode: ModeReport) -> Finding:
    gap, size = mode.gap, _amount(mode.metric, abs(mode.gap.mean))
    interval = f"(95%: {_amount(mode.metric, gap.low, '')} to {_amount(mode.metric, gap.high, '')})"
    if not math.isfinite(gap.mean):
        text = f"{mode.metric.replace('_', '-')} is not finite in evaluation or training mode: look for NaN in outputs"
        return Finding(None, f"gap, {mode.metric}", gap.mean, text)
    if _is_sure(gap, mode.metric):
        text = (
            f"evaluation loses {size} against training mode on the same batches {interval}: running statistics do "
            "not describe single examples; try renorm.weigh(model, validation)"
        )
        return Finding(None, f"gap, {mode.metric}", gap.mean, text)
    if gap.high < 0 and -gap.mean >= _LEAST_GAP.get(mode.metric, 0):
        why, question = "a batch's statistics are noisier than the running ones", ""
        if mode.composition is not None and mode.composition.high < 0:
            why, question = "examples that belong together shift their batch's statistics", ", dependent=True"
        text = (
            f"training mode loses {size} against evaluation on the same batches {interval}: {why}; for further "
            f"training on such batches see renorm.recommend(batch_size=..., total_steps=...{question})"
        )
        return Finding(None, f"gap, {mode.metric}", gap.mean, text)
    text = f"evaluation and training mode do not differ for sure: {_amount(mode.metric, gap.mean)} apart {interval}"
    return Finding(None, f"gap, {mode.metric}", gap.mean, text)


def _composition(mode: ModeReport, corrected: bool) -> Finding | None:
    gap = mode.composition
    if gap is None or not _is_sure(gap, mode.metric):
        return None
    remedy = f"take {_LOOSER}; or train" if corrected else "train with renorm.BatchRenorm, or"
    text = (
        f"training mode is {_amount(mode.metric, gap.mean)} better on batches as they come than on the same examples "
        f"shuffled: the network reads from a batch what is in it, which no single example tells; {remedy} on batches "
        "that are more mixed"
    )
    return Finding(None, f"composition, {mode.metric}", gap.mean, text)


def _amount(metric: str, value: float, unit: str | None = None) -> str:
    if metric == "accuracy":
        return f"{100 * value:.1f}" + (" points of accuracy" if unit is None else unit)
    return f"{value:.4g}" + (f" of {metric.replace('_', '-')}" if unit is None else unit)


def _of_layers(layers: Sequence[LayerReport], causes: Iterable[Finding]) -> Iterable[Finding | None]:
    reached, sound = [layer for layer in layers if layer.batches], _sound(layers)
    yield _worst(reached, _NOT_FINITE)
    yield _worst(layers, _NOT_REACHED)
    yield _fewest(reached)
    for check in _OF_STATISTICS:
        yield _worst(sound, check)
    causes = list(causes)
    for check in _OF_GROUPS:
        if check is not _CLIPPED or all(cause.measure != _LEAK.measure for cause in causes):  # one says it all
            yield _worst(list(filter(_has_groups, sound)), check)
    yield from causes
    yield _worst(sound, _DEAD)


def _causes(layers: Sequence[LayerReport]) -> Iterable[Finding | None]:
    grouped = list(filter(_has_groups, _sound(layers)))
    return (_worst(grouped, check) for check in _OF_LOSSES)


def _sound(layers: Sequence[LayerReport]) -> list[LayerReport]:
    return [layer for layer in layers if layer.batches and _is_finite(layer)]


def _has_groups(layer: LayerReport) -> bool:
    """Whether batches have statistics at all: those of one element say that there is one."""
    return layer.elements > 1


def _is_finite(layer: LayerReport) -> bool:
    """Whether the numbers mean something: r is 0 where a running variance is infinite."""
    numbers = (*layer.r, *layer.d, layer.shift, layer.scale, layer.range_training, layer.range_evaluation)
    return all(map(math.isfinite, numbers)) and min(layer.r[0], layer.scale) > 0


def _factor(ratio: float) -> float:
    """How far a ratio is from 1, either way; NaN for what is no ratio."""
    return max(ratio, 1 / ratio) if ratio > 0 else math.nan


def _beyond(layer: LayerReport, limit: float) -> str:
    return f", and the layer corrects no more than {limit:g}" if layer.corrected else ""


def _reach(layer: LayerReport) -> float:
    """How far normalized values can reach in training."""
    return layer.r_max * layer.bound + layer.d_max if layer.corrected else layer.bound


def _within(layer: LayerReport) -> str:
    if math.isinf(layer.r_max) and math.isinf(layer.d_max):
        return "without limits"
    return f"within limits of {layer.r_max:g} and {layer.d_max:g}"


def _clipping(layer: LayerReport) -> str:
    return (
        f"limits of {layer.r_max:g} and {layer.d_max:g} clip {layer.clipped_r:.1%} of r and {layer.clipped_d:.1%} of d"
    )


class _Check(NamedTuple):
    """A number of a layer that is worth a sentence.

    Args:
        measure: its name.
        value: the number.
        threshold: above which it is worth one.
        text: what it means and what helps, after the layer's name.
    """

    measure: str
    value: Callable[[LayerReport], float]
    threshold: float
    text: Callable[[LayerReport], str]


_LOOSER = (
    "wider limits or none (renorm.Limits.over(total_steps, math.inf, math.inf) for a new training, "
    "renorm.Limits.constant(math.inf, math.inf) for going on with this network)"
)
_OTHER_STATISTICS = "the statistics are of other data or other weights; try renorm.estimate(model, loader)"
_TWO_COMPUTATIONS = (
    "training and evaluation compute different things; try renorm.weigh(model, validation), and before a further "
    "training see renorm.recommend"
)
_NOT_FINITE = _Check(
    "finite", lambda layer: float(not _is_finite(layer)), 0.5,
    lambda layer: "its batches or its running statistics are not finite: its other numbers say nothing",
)  # fmt: skip
_NOT_REACHED = _Check(
    "batches", lambda layer: float(layer.batches == 0), 0.5, lambda layer: "no batch reached it"
)  # fmt: skip
_OF_STATISTICS = (
    _Check(
        "steps", lambda layer: float(layer.steps == 0), 0.5,
        lambda layer: "its running statistics have never been moved; try renorm.estimate(model, loader)",
    ),
    _Check(
        "plain_until", lambda layer: float(layer.plain_until or 0), 0.5,
        lambda layer: f"is plain batch norm until step {layer.plain_until}, and at {layer.steps} now; "
        "inspect again later, or, if the training is shorter, take limits=renorm.Limits.over(total_steps)",
    ),
    _Check(
        "shift", lambda layer: layer.shift, 0.3,
        lambda layer: f"running means lie {layer.shift:.2f} standard deviations from the mean of these data: "
        + _OTHER_STATISTICS,
    ),
    _Check(
        "between_within", lambda layer: layer.between_within, 2.0,
        lambda layer: f"means of batches vary {layer.between_within:.1f} times as much as those of independent "
        "examples would (mean squares between over within): batches are dependent; "
        + (f"the layer corrects for it {_within(layer)}" if layer.corrected
           else "see renorm.recommend(..., dependent=True)"),
    ),
)  # fmt: skip
_CLIPPED = _Check(
    "clipped", lambda layer: max(layer.clipped_r, layer.clipped_d) if layer.corrected else 0.0, 0.05,
    lambda layer: f"{_clipping(layer)}, by which the batch leaks into training: {_LOOSER}, or larger or more mixed "
    "batches",
)  # fmt: skip
_OF_GROUPS = (
    _Check(
        "scale", lambda layer: _factor(layer.scale), 1.25,
        lambda layer: f"standard deviations of batches are {layer.scale:.2f} of the running one: " + _OTHER_STATISTICS,
    ),
    _CLIPPED,
)  # fmt: skip
_LEAK = _Check(
    "gap", lambda layer: layer.gap if layer.corrected else 0.0, 0.1,
    lambda layer: f"training and evaluation differ through clipping: {_clipping(layer)}, so that outputs differ by "
    f"{layer.gap:.2f} (root mean square, before gamma), a leak of the batch that the network may have learned to read; "
    f"take {_LOOSER}",
)  # fmt: skip
# They say why evaluation loses; where it does not, the network gets along with them.
_OF_LOSSES = (
    _LEAK,
    _Check(
        "d_size_95", lambda layer: layer.d_size[1] - (layer.d_max if layer.corrected else 0.0), 1.0,
        lambda layer: f"means of batches lie up to {layer.d_size[1]:.2f} running standard deviations from the running "
        f"mean (95% of |d|){_beyond(layer, layer.d_max)}: " + _TWO_COMPUTATIONS,
    ),
    _Check(
        "r", lambda layer: max(layer.r[2], _factor(layer.r[0])) / (layer.r_max if layer.corrected else 1.0), 2.0,
        lambda layer: f"standard deviations of batches are {layer.r[0]:.2f} to {layer.r[2]:.2f} of the running one "
        f"(5 to 95% of r){_beyond(layer, layer.r_max)}: " + _TWO_COMPUTATIONS,
    ),
    _Check(
        "range_evaluation", lambda layer: layer.range_evaluation / _reach(layer) if layer.bound else 0.0, 1.0,
        lambda layer: f"normalized values reach {layer.range_evaluation:.1f} at evaluation, and cannot exceed "
        f"{_reach(layer):.1f} in training (sqrt(m - 1) for m = {layer.bound**2 + 1:.0f}"
        f"{', ' + _within(layer) if layer.corrected else ''}): later layers see what they were not trained on; try "
        "renorm.weigh(model, validation)",
    ),
)  # fmt: skip
_DEAD = _Check(
    "dead", lambda layer: layer.dead / layer.channels if layer.steps != 0 else 0.0, 1e-9,  # gamma may begin with 0
    lambda layer: f"{layer.dead} of {layer.channels} channels are dead (their output has a standard deviation "
    f"below 0.001) and {layer.nearly_dead} nearly (below 0.01): once the training is over they can be pruned",
)  # fmt: skip


def _fewest(layers: Sequence[LayerReport]) -> Finding | None:
    """Groups of so few elements that they have hardly any statistics, where they are smallest."""
    few = [layer for layer in layers if layer.elements < _ENOUGH_ELEMENTS]
    if not few:
        return None
    least = min(few, key=lambda layer: layer.elements)
    number = "one element has" if least.elements == 1 else f"{least.elements:.0f} elements have"
    others = f" (and {len(few) - 1} of {len(layers)} layers more)" if len(few) > 1 else ""
    text = (
        f"{least.name or '(root)'}: {number} hardly any statistics: before a further training, more examples, or "
        f"more channels together (renorm.BatchGroupNorm, fewer num_groups){others}"
    )
    return Finding(least.name, "elements", least.elements, text, _names(few, least))


def _worst(layers: Sequence[LayerReport], check: _Check) -> Finding | None:
    """One finding for all layers beyond the threshold, which tells of the worst."""
    beyond = [layer for layer in layers if check.value(layer) > check.threshold]  # NaN is not
    if not beyond:
        return None
    worst = max(beyond, key=check.value)
    others = f" (and {len(beyond) - 1} of {len(layers)} layers more, less so)" if len(beyond) > 1 else ""
    text = f"{worst.name or '(root)'}: {check.text(worst)}{others}"
    return Finding(worst.name, check.measure, check.value(worst), text, _names(beyond, worst))


def _names(layers: Iterable[LayerReport], told: LayerReport) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers if layer is not told)
