"""What an inspection found, as numbers: of a layer, of a score, and what they mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..inference.scores import Interval


@dataclass(frozen=True)
class LayerReport:
    """A norm layer over the batches of a data set; NaN where no batch reached it.

    r and d are those that batch renormalization would apply without limits: r the standard deviation of a group
    over the running one, d the difference of the means in running standard deviations.

    Args:
        name: in the model.
        kind: class.
        channels: how many.
        steps: batches that moved the running statistics so far, where the layer counts them.
        r_max: that r's clipping is told for: of the layer at its step, or the paper's 3.
        d_max: that d's clipping is told for: of the layer at its step, or the paper's 5.
        plain_until: step before which the layer's limits keep it to plain batch norm, if that is now.
        corrected: whether limits are at work, so that training and evaluation differ by what is clipped alone.
        batches: statistics groups seen.
        elements: of a group, the median.
        r: 5, 50 and 95% quantiles over groups and channels.
        d: 5, 50 and 95% quantiles over groups and channels.
        d_size: 50 and 95% quantiles of |d|.
        shift: mean over groups of d, its size, the median over channels: running means that are not of these data.
        scale: standard deviation of groups over the running one, merged as the layer's tracking rule does, the median
            over channels; far from 1: running variances that are not of these data.
        clipped_r: share of r outside of [1 / r_max, r_max]; where limits are at work, a leak: there training depends on
            the batch, and evaluation does not.
        clipped_d: share of d outside of [-d_max, d_max], in the same way.
        between_within: mean square of the examples' means between groups over that within, summed over channels in
            units of the running variance: about 1 where groups are i.i.d., more the more alike a group's examples are.
        dead: channels whose output at evaluation has a standard deviation below 0.001.
        nearly_dead: others below 0.01.
        range_training: largest size of a value normalized by its group.
        bound: that it cannot exceed, sqrt(elements - 1) of the largest group.
        range_evaluation: largest size of a value normalized as at evaluation, which has no bound.
        gap: root mean square of what the output in training mode differs by from that at evaluation without an example
            weight, before gamma: what limits leave of r and d. Without limits at work it is all of it.

    Source:
        Ioffe 2017, section 3, for r and d; Summers & Dinneen 2020, equation 2 and appendix A, for the ranges.
    """

    name: str
    kind: str
    channels: int
    steps: int | None
    r_max: float
    d_max: float
    plain_until: int | None = None
    corrected: bool = False
    batches: int = 0
    elements: float = math.nan
    r: tuple[float, ...] = (math.nan,) * 3
    d: tuple[float, ...] = (math.nan,) * 3
    d_size: tuple[float, ...] = (math.nan,) * 2
    shift: float = math.nan
    scale: float = math.nan
    clipped_r: float = math.nan
    clipped_d: float = math.nan
    between_within: float = math.nan
    dead: int = 0
    nearly_dead: int = 0
    range_training: float = math.nan
    bound: float = math.nan
    range_evaluation: float = math.nan
    gap: float = math.nan


@dataclass(frozen=True)
class ModeReport:
    """A score of the model in evaluation mode and with its norm layers in training mode.

    Args:
        metric: name of the score.
        higher_is_better: or smaller.
        evaluation: evaluation mode.
        training: norm layers in training mode, on batches as the loader gives them.
        shuffled: the same on the examples of 32 batches at a time, shuffled among them; None where they cannot be.
        gap: how much better training mode is than evaluation mode on the same batches.
        composition: how much better training mode is on batches as they come than shuffled.
    """

    metric: str
    higher_is_better: bool
    evaluation: Interval
    training: Interval
    shuffled: Interval | None
    gap: Interval
    composition: Interval | None


@dataclass(frozen=True)
class Finding:
    """Something to know or to mend.

    Args:
        layer: name of the layer it is about, the worst one; None for the model.
        measure: name of the number.
        value: the number.
        text: what it means and what helps.
        others: names of the layers that it is true of besides, less so.
    """

    layer: str | None
    measure: str
    value: float
    text: str
    others: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers it is about, the worst first."""
        return () if self.layer is None else (self.layer, *self.others)

    def __str__(self) -> str:
        return self.text
