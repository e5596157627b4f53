"""The one place that chooses how a batch is normalized: by kernels of ours, torch's own, or the definition."""

from __future__ import annotations

from torch import Tensor

from ..activation import Activation
from ..grouping import Grouping
from ..moments import Moments
from . import extension, gpu
from . import kernels as fused
from .composed import compose, finish
from .problem import Correction, Running


def suits_kernels(x: Tensor, residual: Tensor | None) -> bool:
    """Whether `normalize` goes by the kernels: C++ on the CPU, Triton on a GPU.

    Args:
        x: input, (N, C, *S).
        residual: added before the activation, or None.

    Returns:
        False where torch's own operations do it.
    """
    return (extension.suits(x) or gpu.suits(x)) and (residual is None or residual.dtype == x.dtype)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    correction: Running | Correction | None,
    grouping: Grouping,
    eps: float,
    residual: Tensor | None = None,
    act: Activation | None = None,
) -> tuple[Tensor, Moments]:
    """Normalize by `reference.forward`, add the residual, activate; with the gradient in closed form.

    Args:
        x: input, (N, C, *S), not empty.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        mask: True where an element counts, (N, *S), or None.
        correction: what r and d are computed from, or r and d themselves; None for batch norm.
        grouping: which elements share statistics.
        eps: added to the variance.
        residual: added before the activation, shape of x, or None.
        act: activation, or None.

    Returns:
        The output, 0 where masked, and the moments, which are constants for autograd.
    """
    if suits_kernels(x, residual):
        return fused.normalize(x, weight, bias, mask, residual, correction, grouping, eps, act)
    y, moments = compose(x, weight, bias, mask, correction, grouping, eps)
    return finish(y, mask, residual, act), moments
