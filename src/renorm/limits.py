"""The limits of batch renormalization's correction, and how they relax over training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_limits
from .transforms import is_transformed

# P1, section 4: plain batch norm for 5,000 of 130,000 steps, d_max reached at 25,000, r_max at 40,000.
_PAPER_STEPS = 130_000
_PAPER_START = 5_000
_PAPER_D_END = 25_000
_PAPER_R_END = 40_000
_SETTLED = 3.0  # times 1 / momentum: e^-3, or 5%, of the beginning is left


@dataclass(frozen=True)
class Limits:
    """How far the correction r and d may go, as a function of the training step.

    Before `start` the limits are 1 and 0, which is plain batch norm; then r_max grows linearly until step
    `r_end` and d_max until step `d_end`. The defaults are the paper's, for a training of 130,000 steps:
    for another length use `Limits.over(total_steps)`, or a short training never leaves plain batch norm.

    A limit may be infinite: then training and evaluation compute the same function once its ramp is over, and nothing
    of the batch leaks through what is clipped. Its ramp is 1 / (1 - share) for r_max and share / (1 - share) for d_max,
    where share is that of the ramp's steps which are done. Running statistics must mean something by then, which is
    what the plain phase until `start` is for: a fresh layer's are 0 and 1, and unlimited correction towards them is no
    normalization at all.

    Args:
        r_max: r stays within [1 / r_max, r_max]; at least 1, and may be infinite.
        d_max: d stays within [-d_max, d_max]; at least 0, and may be infinite.
        start: step at which the ramps leave 1 and 0, or at which a switch is on; counted by `num_batches_tracked`.
        r_end: step at which r_max is reached; `start` makes it a switch.
        d_end: step at which d_max is reached; `start` makes it a switch.

    Raises:
        ValueError: a limit or a step is out of range.

    Source:
        Ioffe 2017, section 4; the linear form of the ramps is ours, the paper says "gradually relaxed".

    Example:
        >>> limits = Limits.over(1_300)
        >>> limits
        Limits(r_max=3.0, d_max=5.0, start=50, r_end=400, d_end=250)
        >>> limits(torch.tensor(225), torch.float32)
        (2.0, 4.375)
    """

    r_max: float = 3.0
    d_max: float = 5.0
    start: int = _PAPER_START
    r_end: int = _PAPER_R_END
    d_end: int = _PAPER_D_END

    def __post_init__(self) -> None:
        check_limits(self.r_max, self.d_max)
        if self.start < 0:
            raise ValueError(f"start must be a step of at least 0, got {self.start}")
        for name, end in (("r_end", self.r_end), ("d_end", self.d_end)):
            if end < self.start:
                raise ValueError(f"{name} must not come before start={self.start}, got {end}")

    @classmethod
    def constant(cls, r_max: float = 3.0, d_max: float = 5.0) -> Limits:
        """The same limits at every step, from the first: for models that are already trained.

        Args:
            r_max: limit of r, at least 1.
            d_max: limit of d, at least 0.

        Returns:
            Limits without a ramp.

        Example:
            >>> Limits.constant(2.0, 1.0)(torch.tensor(0), torch.float32)
            (2.0, 1.0)
        """
        return cls(r_max, d_max, start=0, r_end=0, d_end=0)

    @classmethod
    def over(cls, total_steps: int, r_max: float = 3.0, d_max: float = 5.0) -> Limits:
        """The paper's ramps in proportion to a training of another length.

        Args:
            total_steps: number of training steps, at least 1. Limits count the updates of their own layer: a network
                that takes part in every third step has a third of them.
            r_max: limit of r at the end, at least 1; infinite for none.
            d_max: limit of d at the end, at least 0; infinite for none.

        Returns:
            Limits that start at 1/26 of the training, after a step at least, and end at 8/26 (r) and 5/26 (d).

        Raises:
            ValueError: `total_steps` is less than 1.

        Example:
            >>> Limits.over(130_000) == Limits()
            True
        """
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        start, r_end, d_end = (
            max(1, round(total_steps * step / _PAPER_STEPS)) for step in (_PAPER_START, _PAPER_R_END, _PAPER_D_END)
        )
        return cls(r_max, d_max, start, r_end, d_end)

    @property
    def momentum(self) -> float:
        """Weight of a new batch with which running statistics mean something when the ramps start.

        It leaves 5% of what they began with, but is at least batch renorm's 0.01 and at most nn.BatchNorm's 0.1.
        Limits that hold from the first step are for running statistics that are good already: 0.01.

        Example:
            >>> Limits().momentum, Limits.over(2_600).momentum, Limits.over(400).momentum, Limits.constant().momentum
            (0.01, 0.03, 0.1, 0.01)
        """
        return 0.01 if self.start == 0 else round(min(0.1, max(0.01, _SETTLED / self.start)), 3)

    def __call__(self, step: Tensor, dtype: torch.dtype) -> tuple[float | Tensor, float | Tensor]:
        """r_max and d_max at a step, without leaving the device.

        Args:
            step: number of updates so far, a 0-d integer tensor.
            dtype: floating dtype of the result, where it is a tensor.

        Returns:
            r_max and d_max, as numbers where they never change or the step is at hand, else as 0-d tensors.
        """
        if self.start == self.r_end == self.d_end == 0:
            return self.r_max, self.d_max
        if type(step) is Tensor and step.is_cpu and not (torch.compiler.is_compiling() or is_transformed()):
            return self.at(int(step))
        step = step.to(dtype)
        return self._ramp(step, 1.0, self.r_max, self.r_end), self._ramp(step, 0.0, self.d_max, self.d_end)

    def at(self, step: int) -> tuple[float, float]:
        """r_max and d_max at a step, as numbers.

        Args:
            step: number of updates so far.

        Returns:
            r_max and d_max.

        Example:
            >>> Limits.over(1_300).at(225)
            (2.0, 4.375)
            >>> Limits.over(1_300, math.inf, math.inf).at(225)
            (2.0, 7.0)
        """
        if step >= self.r_end and step >= self.d_end:
            return self.r_max, self.d_max
        return self._at(step, 1.0, self.r_max, self.r_end), self._at(step, 0.0, self.d_max, self.d_end)

    def _at(self, step: int, low: float, high: float, end: int) -> float:
        if step < self.start:
            return low
        if step >= end:
            return high
        share = (step - self.start) / (end - self.start)
        return low + share / (1 - share) if high == math.inf else low + (high - low) * share

    def _ramp(self, step: Tensor, low: float, high: float, end: int) -> Tensor:
        if end == self.start:
            return torch.full_like(step, high).where(step >= end, low)
        share = ((step - self.start) / (end - self.start)).clamp(0, 1)
        return low + share / (1 - share) if high == math.inf else low + (high - low) * share


UNLIMITED = Limits.constant(r_max=math.inf, d_max=math.inf)

# No correction, but single elements are still taken: while statistics are taken anew.
AT_REST = Limits.constant(r_max=1.0, d_max=0.0)
