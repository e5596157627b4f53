"""What is normalized and how: the terms in which all operations are called.

Shapes: N examples, C channels, positions *S; G example groups, K channel groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..activation import Activation, require_activation
from ..checks import check_input, check_mask, check_residual
from ..grouping import Grouping
from ..moments import Moments


class Inputs(NamedTuple):
    """The tensors that are normalized together.

    Args:
        x: input, (N, C, *S), floating point.
        weight: gamma, (C,); None for 1.
        bias: beta, (C,); None for 0.
        mask: True where an element counts, (N, *S), or broadcastable to it before `dispatch` has checked it; None for
            everywhere.
        residual: added before the activation, shape of x; None for nothing.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    residual: Tensor | None = None


# The same without names, which take longer to make than to read.
Given = tuple[Tensor, "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]


class Settings(NamedTuple):
    """How they are normalized.

    Args:
        grouping: which elements share statistics.
        eps: added to the variance.
        act: activation applied last, by name; None for none.
    """

    grouping: Grouping
    eps: float
    act: Activation | None = None


class Running(NamedTuple):
    """Running statistics.

    Args:
        mean: (C,), float32 at least.
        var: (C,), same dtype.
    """

    mean: Tensor
    var: Tensor


class Target(NamedTuple):
    """Running statistics that batches are corrected towards, and the limits of that.

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


class RunningState(NamedTuple):
    """The buffers of a layer that a batch moves.

    Args:
        mean: running means, (C,), float32 or float64.
        var: running variances, (C,), same dtype.
        steps: batches that moved them, 0-d int64.
        skipped: batches that did not, because their moments were not finite; 0-d int64.
    """

    mean: Tensor
    var: Tensor
    steps: Tensor
    skipped: Tensor


class Normalized(NamedTuple):
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
    """What its backward returns.

    Args:
        x: shape and dtype of x.
        weight: (C,).
        bias: (C,).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor


class Implementation(NamedTuple):
    """A way to compute both, without residual and activation.

    Args:
        forward: from inputs, not empty, settings, and what is corrected by: a `Target`, a `Correction` or None.
        backward: from the output's gradient, the inputs, the settings, and the forward's moments and correction.
    """

    forward: Callable[[Inputs, Settings, Target | Correction | None], Normalized]
    backward: Callable[[Tensor, Inputs, Settings, Moments, Correction | None], Gradients]


class LaunchError(RuntimeError):
    """Kernels that are there do not compile or run: no compiler, a dtype or chip that they do not know."""


def checked(inputs: Inputs, settings: Settings, running: Running | RunningState | Target | None = None) -> Inputs:
    """Refuse what cannot be normalized together.

    Args:
        inputs: as a caller gives them.
        settings: with the activation.
        running: statistics that must fit; None for none.

    Returns:
        The inputs, the mask as (N, *S), the residual in x's dtype.

    Raises:
        TypeError: x is not floating point, or the mask not boolean.
        ValueError: a shape does not fit, or the activation is unknown.
    """
    x, weight, bias, mask, residual = inputs
    mean, var = (None, None) if running is None else (running.mean, running.var)
    check_input(x, running_mean=mean, running_var=var, weight=weight, bias=bias)
    check_residual(residual, x)
    require_activation(settings.act)
    if residual is not None and residual.dtype != x.dtype:
        residual = residual.to(x.dtype)
    return Inputs(x, weight, bias, None if mask is None else check_mask(mask, x), residual)


def require_unchanged(dy: Tensor, saved: Sequence[Any], kept_bytes: int) -> None:
    """Refuse what was exchanged since the forward: past the dispatcher, nobody else looks how much memory there is.

    Args:
        dy: gradient of the output, of whose size and dtype x is.
        saved: x, weight, mask, residual, y and what else the forward kept.
        kept_bytes: size of the last.

    Raises:
        RuntimeError: hooks for saved tensors, or `.data`, have exchanged something for what has not its size or dtype.
    """
    x, weight, mask, residual, y, kept = saved
    # dy is as autograd has checked; no loop, which a small layer would notice
    if x.nbytes != dy.nbytes or x.dtype is not dy.dtype:
        _refuse_changed(x, f"{dy.numel()} elements of {dy.dtype}")
    if y is not None and (y.nbytes != dy.nbytes or y.dtype is not dy.dtype):
        _refuse_changed(y, f"{dy.numel()} elements of {dy.dtype}")
    if residual is not None and (residual.nbytes != dy.nbytes or residual.dtype is not dy.dtype):
        _refuse_changed(residual, f"{dy.numel()} elements of {dy.dtype}")
    if weight is not None and weight.numel() != x.shape[1]:
        _refuse_changed(weight, f"{x.shape[1]} elements")
    if mask is not None and (mask.dtype is not torch.bool or mask.numel() * x.shape[1] != x.numel()):
        _refuse_changed(mask, f"{x.numel() // x.shape[1]} elements of {torch.bool}")
    if kept.nbytes != kept_bytes:
        _refuse_changed(kept, f"{kept_bytes} bytes")


def _refuse_changed(tensor: Tensor, expected: str) -> NoReturn:
    raise RuntimeError(
        f"a tensor saved for the backward must have {expected}, as in the forward, and a hook for saved tensors, or "
        f"`.data`, made it {tensor.dtype} of shape {tuple(tensor.shape)}"
    )
