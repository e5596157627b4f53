"""From an inspection's numbers to what they mean and what helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from .report import Finding, LayerReport, ModeReport

# From where on a number is worth a sentence.
_LEAST_GAP = {"accuracy": 0.005}
_BETWEEN_WITHIN = 2.0
_D_SIZE = 1.0
_R_FACTOR = 2.0
_SHIFT = 0.3
_SCALE = 1.25
_CLIPPED = 0.05
_BEYOND_BOUND = 1.0
_NOTHING = (
    "running statistics describe the batches, and no batch depends on what it is made of: nothing much is to be gained "
    "at evaluation"
)


def find(layers: Sequence[LayerReport], modes: Sequence[ModeReport]) -> tuple[Finding, ...]:
    """Say what the numbers mean.

    Args:
        layers: reports of the layers.
        modes: reports of the scores; empty where the loader has no targets.

    Returns:
        The findings: of the model, then of its layers.
    """
    of_modes, of_layers = _of_modes(modes), [finding for finding in _of_layers(layers) if finding is not None]
    if of_layers or any(map(_evaluation_loses, modes)):
        return (*of_modes, *of_layers)
    return (*of_modes, Finding(None, "none", 0.0, _NOTHING))


def _evaluation_loses(mode: ModeReport) -> bool:
    return mode.gap.low > 0 and mode.gap.mean >= _LEAST_GAP.get(mode.metric, 0)


def _of_modes(modes: Sequence[ModeReport]) -> list[Finding]:
    return [*map(_gap, modes), *filter(None, map(_composition, modes))]


def _gap(mode: ModeReport) -> Finding:
    gap, size = mode.gap, _amount(mode.metric, abs(mode.gap.mean))
    interval = f"(95%: {_amount(mode.metric, gap.low, '')} to {_amount(mode.metric, gap.high, '')})"
    if _evaluation_loses(mode):
        text = (
            f"evaluation loses {size} against training mode on the same batches {interval}: running statistics do "
            "not describe single examples; try renorm.weigh(model, validation)"
        )
        return Finding(None, f"gap, {mode.metric}", gap.mean, text)
    if gap.high < 0 and -gap.mean >= _LEAST_GAP.get(mode.metric, 0):
        text = (
            f"training mode loses {size} against evaluation on the same batches {interval}: a batch's statistics are "
            "noisier than the running ones; for further training on such batches "
            "renorm.convert(model, renorm.BatchRenorm)"
        )
        return Finding(None, f"gap, {mode.metric}", gap.mean, text)
    text = f"evaluation and training mode do not differ for sure: {_amount(mode.metric, gap.mean)} apart {interval}"
    return Finding(None, f"gap, {mode.metric}", gap.mean, text)


def _composition(mode: ModeReport) -> Finding | None:
    gap = mode.composition
    if gap is None or gap.low <= 0 or gap.mean < _LEAST_GAP.get(mode.metric, 0):
        return None
    text = (
        f"training mode is {_amount(mode.metric, gap.mean)} better on batches as they come than on the same examples "
        "shuffled: the network reads from a batch what is in it, which no single example tells; train with "
        "renorm.BatchRenorm, or on batches that are more mixed"
    )
    return Finding(None, f"composition, {mode.metric}", gap.mean, text)


def _amount(metric: str, value: float, unit: str | None = None) -> str:
    if metric == "accuracy":
        return f"{100 * value:.1f}" + (" points of accuracy" if unit is None else unit)
    return f"{value:.4g}" + (f" of {metric.replace('_', '-')}" if unit is None else unit)


def _of_layers(layers: Sequence[LayerReport]) -> Iterable[Finding | None]:
    seen = [layer for layer in layers if layer.batches]
    yield _worst(
        layers, "batches", lambda layer: 0.0 if layer.batches else 1.0, 0.5, lambda layer: "no batch reached it"
    )
    yield _worst(
        seen, "steps", lambda layer: float(layer.steps == 0), 0.5,
        lambda layer: "its running statistics have never been moved; try renorm.estimate(model, loader)",
    )  # fmt: skip
    yield _worst(
        seen, "plain_until", lambda layer: float(layer.plain_until or 0), 0.5,
        lambda layer: f"is plain batch norm until step {layer.plain_until}, and at {layer.steps} now; "
        "try limits=renorm.Limits.over(total_steps)",
    )  # fmt: skip
    yield _worst(
        seen, "shift", lambda layer: layer.shift, _SHIFT,
        lambda layer: f"running means lie {layer.shift:.2f} standard deviations from the mean of these data: the "
        "statistics are of other data or other weights; try renorm.estimate(model, loader)",
    )  # fmt: skip
    yield _worst(
        seen, "scale", lambda layer: max(layer.scale, 1 / layer.scale), _SCALE,
        lambda layer: f"standard deviations of batches are {layer.scale:.2f} of the running one: the statistics are "
        "of other data or other weights; try renorm.estimate(model, loader)",
    )  # fmt: skip
    yield _worst(
        seen, "between_within", lambda layer: layer.between_within, _BETWEEN_WITHIN,
        lambda layer: f"means of batches vary {layer.between_within:.1f} times as much as those of independent "
        "examples would (mean squares between over within): batches are dependent; train with renorm.BatchRenorm",
    )  # fmt: skip
    yield _worst(
        seen, "d_size_95", lambda layer: layer.d_size[1], _D_SIZE,
        lambda layer: f"means of batches lie up to {layer.d_size[1]:.2f} running standard deviations from the running "
        "mean (95% of |d|): training and evaluation compute different things; train with renorm.BatchRenorm, or try "
        "renorm.weigh(model, validation)",
    )  # fmt: skip
    yield _worst(
        seen, "r", lambda layer: max(layer.r[2], 1 / layer.r[0]), _R_FACTOR,
        lambda layer: f"standard deviations of batches are {layer.r[0]:.2f} to {layer.r[2]:.2f} of the running one "
        "(5 to 95% of r): training and evaluation compute different things; train with renorm.BatchRenorm, or try "
        "renorm.weigh(model, validation)",
    )  # fmt: skip
    yield _worst(
        seen, "clipped", lambda layer: max(layer.clipped_r, layer.clipped_d), _CLIPPED,
        lambda layer: f"limits of {layer.r_max:g} and {layer.d_max:g} clip {layer.clipped_r:.1%} of r and "
        f"{layer.clipped_d:.1%} of d: wider limits, or larger or more mixed batches",
    )  # fmt: skip
    yield _worst(
        seen, "range_evaluation", lambda layer: layer.range_evaluation / layer.bound if layer.bound else 0.0,
        _BEYOND_BOUND,
        lambda layer: f"normalized values reach {layer.range_evaluation:.1f} at evaluation, and cannot exceed "
        f"{layer.bound:.1f} in training (sqrt(m - 1) for m = {layer.bound**2 + 1:.0f}): later layers see what they "
        "were not trained on; try renorm.weigh(model, validation)",
    )  # fmt: skip
    yield _worst(
        seen, "dead", lambda layer: layer.dead / layer.channels, 1e-9,
        lambda layer: f"{layer.dead} of {layer.channels} channels are dead (their output has a standard deviation "
        f"below 0.001) and {layer.nearly_dead} nearly (below 0.01): they can be pruned",
    )  # fmt: skip


def _worst(
    layers: Sequence[LayerReport], measure: str, value: Callable[[LayerReport], float], threshold: float,
    text: Callable[[LayerReport], str],
) -> Finding | None:  # fmt: skip
    """One finding for all layers beyond the threshold, which tells of the worst."""
    beyond = [layer for layer in layers if not math.isnan(value(layer)) and value(layer) > threshold]
    if not beyond:
        return None
    worst = max(beyond, key=value)
    others = f" (and {len(beyond) - 1} of {len(layers)} layers more, less so)" if len(beyond) > 1 else ""
    return Finding(worst.name, measure, value(worst), f"{worst.name or '(root)'}: {text(worst)}{others}")
