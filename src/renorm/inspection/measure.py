"""What a norm layer sees and does in the batches of a data set, in training and evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..grouping import Grouping
from ..inference.passes import arguments
from ..limits import Limits
from ..modules import grouping_of
from ..moments import Moments
from ..norm import Norm
from ..ops.problem import Correction, Target
from ..ops.statistics import correct, merge_channels, merge_running, moments_of, spread
from ..ops.tracking import rule_of
from .records import LayerReport

_DEAD, _NEARLY_DEAD = 1e-3, 1e-2  # standard deviation of a channel's output at evaluation


class _Examples(NamedTuple):
    """An input, example by example: moments (N, C), and the extremes (N, C)."""

    moments: Moments
    low: Tensor
    high: Tensor


@dataclass(eq=False)
class Measurement:
    """What a layer's forwards left, to be summed up.

    Args:
        name: of the layer in the model.
        layer: of renorm or nn.BatchNorm, with running statistics.
    """

    name: str
    layer: Any
    _r: list[Tensor] = field(default_factory=list)  # (G, K) of each batch
    _d: list[Tensor] = field(default_factory=list)
    _means: list[Tensor] = field(default_factory=list)  # (G, C), of groups
    _spreads: list[Tensor] = field(default_factory=list)  # (G, C), sum of squares of example means within groups
    _sizes: list[Tensor] = field(default_factory=list)  # (G,), examples in groups
    _elements: list[Tensor] = field(default_factory=list)  # (G,)
    _gaps: list[Tensor] = field(default_factory=list)  # (G, K), squared
    _outputs: list[Moments] = field(default_factory=list)  # (C,) of each batch
    _range_training: float = 0.0
    _range_evaluation: float = 0.0

    def in_training(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Take in the input of a training forward; a forward pre-hook."""
        x, mask = arguments(inputs, named)
        if x.numel() == 0:
            return
        if x.numel() == x.shape[1] and not isinstance(layer, Norm):
            raise ValueError(
                f"loader has a batch of one element per channel at layer {self.name or '(root)'}, which nn.BatchNorm "
                "cannot normalize in training: give batches as the model was trained on, with drop_last=True"
            )
        k, target = self._channels_per_group, self._target()
        examples = _examples(x, mask)
        for part in _parts(examples, self._grouping):
            channel = part.moments.merged(dim=1)  # (G, C)
            group = merge_channels(channel, k)
            r, d = wanted = correct(group, target, k, self._eps)
            counted = group.count[:, 0] > 0
            self._r.append(r[counted].cpu())
            self._d.append(d[counted].cpu())
            applied = within(wanted, *self._limits)
            self._gaps.append(squared_gap(group, wanted, applied, self._eps)[counted].cpu())
            self._means.append(channel.mean[counted].cpu())
            self._spreads.append((part.moments.mean - channel.mean[:, None]).square().sum(1)[counted].cpu())
            self._sizes.append(torch.full_like(group.count[counted, 0], part.low.shape[1]).cpu())
            self._elements.append(group.count[counted, 0].cpu())
            mean, sigma = (spread(t, k)[:, None] for t in (group.mean, (group.var + self._eps).sqrt()))
            self._range_training = max(self._range_training, _reach(part, mean, sigma))

    def in_evaluation(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        """Take in the input and the output of an evaluation forward; a forward hook."""
        x, mask = arguments(inputs, named)
        if x.numel() == 0:
            return
        outputs = moments_of(output, mask, Grouping())
        self._outputs.append(Moments(*(moment[0].cpu() for moment in outputs)))
        examples, k = _examples(x, mask), self._channels_per_group
        alpha = getattr(self.layer, "example_weight", 0.0)
        running = merge_running(self.layer.running_mean, self.layer.running_var, k)
        own = merge_channels(examples.moments, k)
        difference = own.mean - running.mean
        var = (1 - alpha) * running.var + alpha * own.var + alpha * (1 - alpha) * difference.square()
        mean, sigma = spread(running.mean + alpha * difference, k), spread((var + self._eps).sqrt(), k)
        self._range_evaluation = max(self._range_evaluation, _reach(examples, mean, sigma))

    def report(self) -> LayerReport:
        """Sum up."""
        layer = self.layer
        steps = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
        found = LayerReport(self.name, type(layer).__name__, layer.num_features, steps, **self._limits_told())
        if not self._r:
            return found
        r, d, elements = torch.cat(self._r), torch.cat(self._d), torch.cat(self._elements)
        dead, nearly_dead = self._dead()
        return replace(
            found,
            batches=len(r), elements=float(elements.median()),
            r=quantiles(r, 0.05, 0.5, 0.95), d=quantiles(d, 0.05, 0.5, 0.95), d_size=quantiles(d.abs(), 0.5, 0.95),
            shift=float(d.mean(0).abs().median()), scale=self._scale(r, elements),
            clipped_r=_share((r > found.r_max) | (r < 1 / found.r_max)), clipped_d=_share(d.abs() > found.d_max),
            between_within=self._between_within(), dead=dead, nearly_dead=nearly_dead,
            range_training=self._range_training, bound=math.sqrt(max(float(elements.max()) - 1, 0)),
            range_evaluation=self._range_evaluation, gap=float(torch.cat(self._gaps).double().mean().sqrt()),
        )  # fmt: skip

    def _scale(self, r: Tensor, elements: Tensor) -> float:
        if rule_of(self.layer.tracking if isinstance(self.layer, Norm) else "var").averages_sigma:
            return float(r.mean(0).median())
        # a running variance is unbiased, or nearly, and that of a group of m elements (m - 1) / m of it
        unbiased = r.square() * (elements / (elements - 1).clamp(min=1))[:, None]
        return float(unbiased.mean(0).sqrt().median())

    def _between_within(self) -> float:
        """Variance of example means between groups over that within, in mean squares: 1 where groups are i.i.d."""
        sizes, means = torch.cat(self._sizes), torch.cat(self._means).double()  # (G,), (G, C)
        groups, examples = len(sizes), float(sizes.sum())
        if groups < 2 or examples == groups:
            return math.nan
        grand = (sizes[:, None] * means).sum(0) / examples
        between = (sizes[:, None] * (means - grand).square()).sum(0) / (groups - 1)
        within = torch.cat(self._spreads).double().sum(0) / (examples - groups)
        scale = self.layer.running_var.cpu().double() + self._eps
        return float((between / scale).sum() / (within / scale).sum())

    def _dead(self) -> tuple[int, int]:
        moments = Moments(*(torch.stack(parts) for parts in zip(*self._outputs, strict=True))).merged(dim=0)
        deviation = moments.var.sqrt()
        dead = int((deviation < _DEAD).sum())
        return dead, int((deviation < _NEARLY_DEAD).sum()) - dead

    @property
    def _eps(self) -> float:
        return float(self.layer.eps)

    @property
    def _channels_per_group(self) -> int:
        return self._grouping.channels_per_group

    @property
    def _grouping(self) -> Grouping:
        return grouping_of(self.layer)

    def _target(self) -> Target:
        layer = self.layer
        return Target(layer.running_mean, layer.running_var, math.inf, math.inf)

    @property
    def _limits(self) -> tuple[float, float]:
        """Those at work; 1 and 0 are plain batch norm."""
        limits = self._own_limits
        return (1.0, 0.0) if limits is None else limits.at(int(self.layer.num_batches_tracked))

    def _limits_told(self) -> dict[str, Any]:
        """What a report says of the limits: those at work, or the paper's to compare with."""
        r_max, d_max = self._limits
        if (r_max, d_max) != (1.0, 0.0):
            return {"r_max": r_max, "d_max": d_max, "corrected": True}
        paper = {"r_max": Limits().r_max, "d_max": Limits().d_max}
        limits = self._own_limits
        return paper if limits is None else paper | {"plain_until": limits.start}

    @property
    def _own_limits(self) -> Limits | None:
        return self.layer.limits if isinstance(self.layer, Norm) else None


def _examples(x: Tensor, mask: Tensor | None) -> _Examples:
    moments = moments_of(x, mask, Grouping(examples_per_group=1))
    positions = x.flatten(2) if x.ndim > 2 else x[..., None]
    low = high = positions
    if mask is not None:
        counted = mask.reshape(len(x), 1, -1)
        low, high = positions.where(counted, math.inf), positions.where(counted, -math.inf)
    return _Examples(moments, low.amin(2).to(moments.mean.dtype), high.amax(2).to(moments.mean.dtype))


def _parts(examples: _Examples, grouping: Grouping) -> list[_Examples]:
    """Runs of equal groups: every tensor (G, n, C), counts (G, n, 1)."""
    found, start = [], 0
    for groups, size in grouping.parts(len(examples.low)):
        stop = start + groups * size
        tensors = (t[start:stop].unflatten(0, (groups, size)) for t in (*examples.moments, *examples[1:]))
        mean, var, count, low, high = tensors
        found.append(_Examples(Moments(mean, var, count), low, high))
        start = stop
    return found


def _reach(examples: _Examples, mean: Tensor, sigma: Tensor) -> float:
    """Largest size of a normalized value."""
    reach = torch.maximum((mean - examples.low) / sigma, (examples.high - mean) / sigma)
    return max(0.0, float(reach.max()))


def within(wanted: Correction, r_max: Any, d_max: Any) -> Correction:
    """What limits, numbers or 0-d tensors, let through of a correction; 1 and 0 let nothing."""
    return Correction(wanted.r.clamp(1 / r_max, r_max), wanted.d.clamp(-d_max, d_max))


def squared_gap(group: Moments, wanted: Correction, applied: Correction, eps: float) -> Tensor:
    """Mean square of what outputs in training differ by from those at evaluation, before gamma.

    Args:
        group: moments of every group, (G, K).
        wanted: r and d without limits.
        applied: r and d within them.
        eps: added to the variance.

    Returns:
        What clipping leaves, (G, K).
    """
    # the normalized batch has mean 0 and variance var / (var + eps)
    variance = group.var / (group.var + eps)
    return (wanted.r - applied.r).square() * variance + (wanted.d - applied.d).square()


def quantiles(values: Tensor, *at: float) -> tuple[float, ...]:
    """Quantiles of any number of values, each the value that is nearest.

    Args:
        values: any shape, at least one.
        at: which, in [0, 1].

    Returns:
        The quantiles.
    """
    ordered = values.flatten().sort().values  # torch.quantile takes no more than 16 million
    return tuple(float(ordered[round(q * (len(ordered) - 1))]) for q in at)


def _share(chosen: Tensor) -> float:
    return float(chosen.double().mean())
