"""r, d and what leaks into training through what limits clip, as numbers for any logger."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.passes import arguments
from ..inspection.measure import quantiles, squared_gap, within
from ..modules import grouping_of, tracking_layers
from ..norm import Norm
from ..occasions import Frozen
from ..ops.problem import Target
from ..ops.statistics import correct, merge_channels, moments_of
from ..recomputation import is_backward

_KEPT = 64  # measurements of a layer, if nobody asks
_QUANTILES = {"low": 0.05, "median": 0.5, "high": 0.95}


class Monitor:
    """What `monitor` returns; a context manager, which closes at the end."""

    def __init__(self, layers: dict[str, Any], every: int) -> None:
        self._watches = {name: _Watch(every) for name in layers}
        self._handles = [
            layer.register_forward_pre_hook(self._watches[name], with_kwargs=True) for name, layer in layers.items()
        ]

    def compute(self) -> dict[str, float]:
        """The numbers since the last call, of which there are none for layers without a measurement.

        Returns:
            By "quantity/layer": r_low, r_median, r_high, d_low, d_median, d_high (5%, 50% and 95%), clipped_r,
            clipped_d, in [0, 1], which are the shares that leak, and gap, how much of the output that is.
        """
        found = {name: summary for name, watch in self._watches.items() if (summary := watch.summary())}
        return {f"{key}/{name}": value for name, summary in found.items() for key, value in summary.items()}

    def close(self) -> None:
        """Measure no more."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def monitor(model: nn.Module, every: int = 10) -> Monitor:
    """Watch r and d of a model's norm layers while it trains.

    Measures the batches of one training forward in `every`, layer by layer, where the model computes; nothing waits for
    a device before `compute`. The training's numbers stay the same, bit for bit. For nn.BatchNorm, and layers without
    limits, r and d are those that batch renorm would apply.

    The gap of a layer is the root mean square, over a batch, of what its output in training differs by from that at
    evaluation without an example weight, before gamma: what the limits leave of r and d. Plain batch norm has all of
    it, batch renorm within its limits none.

    What is clipped is a leak: by it, training still depends on the batch, and evaluation does not. Where batches tell
    something of their examples, a long training can learn to read it. If clipped_r or clipped_d stays above a few
    percent once the ramps are over, take looser limits or none: `Limits.over(total_steps, math.inf, math.inf)` for a
    new training, `Limits.constant(math.inf, math.inf)` for going on with a trained network.

    Measured is what a layer normalizes by the batch; checkpoints' recomputations are not measured once more, and
    compiled code is not measured at all. With `sync="batch"` r and d are those of this worker's part. Without a call of
    `compute`, the last 64 measurements are kept.

    Args:
        model: with layers of renorm, nn.BatchNorm or its subclasses that have running statistics.
        every: training forwards of a layer from one measurement to the next, at least 1.

    Returns:
        The monitor.

    Raises:
        ValueError: `every` is less than 1, or the model has no such layer.

    Source:
        Ioffe 2017, algorithm 1, for r and d.

    Example:
        >>> import renorm
        >>> model = nn.Sequential(renorm.BatchRenorm1d(3, limits=renorm.Limits.constant(r_max=2.0, d_max=0.5)))
        >>> with monitor(model, every=1) as watch:
        ...     y = model(torch.tensor([[5.0, 0.0, 1.0], [7.0, 0.0, 3.0]]))
        >>> numbers = watch.compute()
        >>> round(numbers["d_high/0"], 3), round(numbers["clipped_d/0"], 3)  # means of 6, 0 and 2
        (6.0, 0.667)
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    return Monitor(tracking_layers(model), every)


class _Watch:
    """A layer's forward pre-hook, with what it measured."""

    def __init__(self, every: int) -> None:
        self._every, self._forwards = every, 0
        self._measured: deque[Tensor] = deque(maxlen=_KEPT)  # (5, groups) each

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not _normalizes_by_batch(layer):
            return
        self._forwards += 1
        if self._forwards % self._every:
            return
        with torch.no_grad():
            measured = _measure(layer, *arguments(inputs, named))
        if measured is not None:
            self._measured.append(measured)

    def summary(self) -> dict[str, float]:
        if not self._measured:
            return {}
        measured = torch.cat(tuple(self._measured), 1).cpu().double()
        self._measured.clear()
        r, d, *shares = measured[:, measured[0].isfinite()]
        if not len(r):
            return {}
        found: dict[str, float] = {}
        for name, values in (("r", r), ("d", d)):
            at = quantiles(values, *_QUANTILES.values())
            found |= {f"{name}_{key}": value for key, value in zip(_QUANTILES, at, strict=True)}
        clipped_r, clipped_d, squared_gap = (float(share.mean()) for share in shares)
        return found | {"clipped_r": clipped_r, "clipped_d": clipped_d, "gap": squared_gap**0.5}


def _normalizes_by_batch(layer: Any) -> bool:
    if not layer.training or is_backward():
        return False
    frozen = [block for block in getattr(layer, "blocks", ()) if isinstance(block, Frozen)]
    return not frozen or frozen[-1].statistics == "batch"


def _measure(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """r, d, whether they are clipped, and the squared gap of every group, (5, groups); NaN for groups of nothing."""
    if x.numel() == 0:
        return None
    grouping = grouping_of(layer)
    group = merge_channels(moments_of(x, mask, grouping), grouping.channels_per_group)
    target = Target(layer.running_mean, layer.running_var, math.inf, math.inf)
    wanted = correct(group, target, grouping.channels_per_group, layer.eps)
    limits: Any = layer.limits if isinstance(layer, Norm) else None
    r_max, d_max = (1.0, 0.0) if limits is None else limits(layer.num_batches_tracked, wanted.r.dtype)
    applied = within(wanted, r_max, d_max)
    gap = squared_gap(group, wanted, applied, layer.eps)
    rows = torch.stack((*wanted, applied.r != wanted.r, applied.d != wanted.d, gap))
    return rows.where(group.count > 0, torch.nan).flatten(1)
