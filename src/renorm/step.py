"""A layer's training step: a batch is normalized, and the running statistics move."""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional as F
from .activation import Activation
from .checks import check_batch, check_groups
from .grouping import Grouping
from .limits import Limits
from .ops import kernels as fused
from .ops.normalize import suits_kernels
from .ops.plain import suits_state
from .ops.problem import Running
from .ops.snapshot import snapshot
from .ops.tracking import RunningState, Tracking, commit


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    state: RunningState,
    limits: Limits | None,
    grouping: Grouping,
    eps: float,
    act: Activation | None,
    tracking: Tracking,
    momentum: float | None,
) -> Tensor:
    """Normalize a batch by its own statistics, corrected towards the running ones, which then move.

    Args:
        x: input, (N, C, *S), floating point.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        mask: True where an element counts, (N, *S) or broadcastable to it, or None.
        residual: added before the activation, shape of x, or None.
        state: the layer's buffers, moved in place.
        limits: of the correction; None for batch norm.
        grouping: which elements share statistics.
        eps: added to the variance.
        act: activation applied last, by name, or None.
        tracking: see `tracking.update_running`.
        momentum: see `tracking.commit`.

    Returns:
        The output.

    Raises:
        TypeError: x is not floating point, or the mask not boolean.
        ValueError: a shape does not fit, or a group has a single element and no correction.
    """
    has_kernels = suits_kernels(x, residual)
    if has_kernels and _is_one_operation(x, state):
        mask = check_batch(x, weight, bias, mask, state.mean, state.var, residual, act)
        check_groups(x, grouping, corrected=limits is not None)
        now = None if limits is None else limits(state.steps, state.mean.dtype)
        return fused.normalize_and_track(
            x, weight, bias, mask, residual, state, now, grouping, eps, act, tracking, momentum
        )
    running = correction(x, state, limits, has_kernels)
    y, moments = F.normalize_batch(x, weight, bias, mask, running, grouping, eps, residual, act)
    if x.numel() > 0:
        commit(
            state, moments,
            momentum=momentum, tracking=tracking, channels_per_group=grouping.channels_per_group, eps=eps,
        )  # fmt: skip
    return y


def _is_one_operation(x: Tensor, state: RunningState) -> bool:
    # What is compiled needs the statistics as an output, to move them where it can order the writes.
    if torch.compiler.is_compiling() or x.numel() == 0:
        return False
    return state.mean.dtype == torch.promote_types(x.dtype, torch.float32) and suits_state(x, state)


def correction(x: Tensor, state: RunningState, limits: Limits | None, has_kernels: bool) -> Running | None:
    """What a batch is corrected towards.

    Args:
        x: input, (N, C, *S).
        state: the layer's buffers.
        limits: of the correction; None for batch norm.
        has_kernels: whether `suits_kernels` says so of x.

    Returns:
        Running statistics and limits in x's accumulation dtype; None for batch norm.
    """
    if limits is None:
        return None
    mean, var, steps = state.mean, state.var, state.steps
    if not has_kernels:  # these keep r and d themselves
        mean, var, steps = snapshot(mean), snapshot(var), snapshot(steps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mean.dtype != dtype:
        mean, var = mean.to(dtype), var.to(dtype)
    return Running(mean, var, *limits(steps, dtype))
