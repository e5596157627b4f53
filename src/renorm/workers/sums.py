"""Moments of many layers as sums that workers can add, in a few operations for all layers together.

float64, in which E[x^2] - E[x]^2 errs by 1e-16 of E[x]^2: less than what float32 inputs can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..moments import Moments
from ..ops.tracking import Tracking, rule_of
from ..transforms import unwatched


class Summed(NamedTuple):
    """What decides which sums a layer needs.

    Args:
        num_features: C.
        tracking: how the running variance moves.
        channels_per_group: consecutive channels that share statistics.
        eps: added to the variance where "std" takes its square root.
    """

    num_features: int
    tracking: Tracking
    channels_per_group: int
    eps: float


class _Row(NamedTuple):
    """A layer's batches as if they were one group: mean and var (C,), the others (1,)."""

    mean: Tensor
    var: Tensor
    elements: Tensor
    most: Tensor  # elements of its largest group
    left_out: Tensor  # batches that are not finite


class _Places(NamedTuple):
    """Constants of the channels of all layers, one after the other."""

    layer: Tensor
    eps: Tensor
    averages_sigma: Tensor
    is_unbiased: Tensor
    needs_spread: Tensor
    channels_per_group: Tensor  # of each layer


def to_sums(layers: Sequence[Summed], batches: Sequence[Sequence[Moments]], device: torch.device) -> Tensor:
    """What the layers of a worker contribute.

    Args:
        layers: all of them.
        batches: of each layer, moments of every channel in every example group of each batch, (G, C).
        device: of the result.

    Returns:
        For each layer: elements, whether a group has more than one, batches that are not finite, (3, layers); then two
        sums over elements for each channel, (2, channels of all layers); flat.
    """
    places = _places(layers, device)
    rows = [_row(layer, several, device) for layer, several in zip(layers, batches, strict=True)]
    mean, var, count, most, left_out = (torch.cat(parts).double() for parts in zip(*rows, strict=True))
    second = torch.where(places.averages_sigma, (var + places.eps).sqrt(), var + mean.square())
    junk = torch.zeros_like(count).index_add_(0, places.layer, 0 * (mean + var))  # not a number where not finite
    is_finite = junk == 0
    count = count.where(is_finite, 0)
    has_spread = (most * places.channels_per_group > 1) & is_finite
    header = torch.stack((count, has_spread, left_out + ~is_finite))
    values = torch.stack((mean, second)).where(is_finite[places.layer], 0) * count[places.layer]
    return torch.cat((header.flatten(), values.flatten()))


def from_sums(
    sums: Tensor, layers: Sequence[Summed], running_vars: Sequence[Tensor]
) -> tuple[list[Moments], Sequence[Tensor]]:
    """The moments behind sums, each as of one group that moves the statistics as all the groups together do.

    Args:
        sums: over all workers, as of `to_sums`.
        layers: all of them.
        running_vars: of each layer from before, (C,).

    Returns:
        Moments (1, C) of each layer, in the dtype of its statistics; and the batches that were left out of each.
    """
    places, number = _places(layers, sums.device), len(layers)
    count, spread, left_out = sums[: 3 * number].view(3, number)
    divisor = count.clamp(min=1)
    per_channel = divisor[places.layer]
    mean, second = sums[3 * number :].view(2, -1) / per_channel
    var = torch.where(places.averages_sigma, second.square() - places.eps, second - mean.square()).clamp(min=0)
    # Single elements say nothing of a spread: what leaves the running variance as it is.
    still = torch.cat([running_var.to(sums.device) for running_var in running_vars]).double()
    unbiased = torch.where(places.is_unbiased, still * (1 - 1 / per_channel), still)
    moves = (spread > 0)[places.layer] | ~places.needs_spread
    var = torch.where(moves, var, unbiased)
    widths = [layer.num_features for layer in layers]
    parts = zip(mean.split(widths), var.split(widths), count.split(1), running_vars, strict=True)
    moments = [
        Moments(*(part[None].to(running_var) for part in (layer_mean, layer_var, layer_count)))
        for layer_mean, layer_var, layer_count, running_var in parts
    ]
    return moments, left_out.long().unbind()


def _row(layer: Summed, batches: Sequence[Moments], device: torch.device) -> _Row:
    if not batches:
        nothing = torch.zeros(layer.num_features, device=device)
        return _Row(nothing, nothing, nothing[:1], nothing[:1], nothing[:1])
    if len(batches) == 1 and len(batches[0].mean) == 1:
        mean, var, count = (part[0].to(device) for part in batches[0])
        return _Row(mean, var, count, count, torch.zeros_like(count))
    return _merged_row(layer, batches, device)


def _merged_row(layer: Summed, batches: Sequence[Moments], device: torch.device) -> _Row:
    is_finite = torch.stack([moments.finite().all() for moments in batches])
    kept = torch.cat([ok.expand(len(moments.mean)) for ok, moments in zip(is_finite, batches, strict=True)])[:, None]
    mean, var, count = (torch.cat(parts).double().where(kept, 0) for parts in zip(*batches, strict=True))
    merged = Moments(mean, var, count).merged(0)
    if rule_of(layer.tracking).averages_sigma:
        sigma = (count * (var + layer.eps).sqrt()).sum(0) / merged.count.clamp(min=1)
        merged = merged._replace(var=sigma.square() - layer.eps)
    row = _Row(*merged, count.amax(0), (~is_finite).sum()[None])
    return _Row(*(part.to(device) for part in row))


def _places(layers: Sequence[Summed], device: torch.device) -> _Places:
    if torch.compiler.is_compiling():
        return _find_places(tuple(layers), device)  # constants of the graph
    return _known_places(tuple(layers), device)


@lru_cache(maxsize=32)
@unwatched()
def _known_places(layers: tuple[Summed, ...], device: torch.device) -> _Places:
    return _find_places(layers, device)


def _find_places(layers: tuple[Summed, ...], device: torch.device) -> _Places:
    channels = sum(layer.num_features for layer in layers)
    widths = torch.tensor([layer.num_features for layer in layers], device="cpu")
    rules = [rule_of(layer.tracking) for layer in layers]

    def spread(values: list[float] | list[bool]) -> Tensor:
        dtype = torch.float64 if isinstance(values[0], float) else torch.bool
        return (
            torch.tensor(values, dtype=dtype, device="cpu").repeat_interleave(widths, output_size=channels).to(device)
        )

    return _Places(
        torch.arange(len(layers), device="cpu").repeat_interleave(widths, output_size=channels).to(device),
        spread([layer.eps for layer in layers]),
        spread([rule.averages_sigma for rule in rules]),
        spread([rule.is_unbiased for rule in rules]),
        spread([rule.needs_spread for rule in rules]),
        torch.tensor([layer.channels_per_group for layer in layers], device=device),
    )
