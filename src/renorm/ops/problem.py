"""What goes into and comes out of the operations.

Shapes: N examples, C channels, positions *S; G example groups, K channel groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..moments import Moments


class Running(NamedTuple):
    """Running statistics, and the limits of the correction towards them.

    Args:
        mean: running means, (C,).
        var: running variances, (C,).
        r_max: limit of r, a number or 0-d.
        d_max: limit of d, a number or 0-d.
    """

    mean: Tensor
    var: Tensor
    r_max: Any  # torch's type stubs know clamp by numbers and by tensors, but not by either
    d_max: Any


class Correction(NamedTuple):
    """Batch renormalization's correction, constant for the gradient.

    Args:
        r: factor of the scale, (G, K).
        d: shift in units of the running standard deviation, (G, K).
    """

    r: Tensor
    d: Tensor


class Forward(NamedTuple):
    """What a training forward returns.

    Args:
        y: output, shape and dtype of x.
        moments: of every channel in every example group, (G, C); its count is (G, 1).
        correction: r and d as applied; None for batch norm.
    """

    y: Tensor
    moments: Moments
    correction: Correction | None


class Gradients(NamedTuple):
    """What a backward returns.

    Args:
        x: shape and dtype of x.
        weight: (C,).
        bias: (C,).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
