"""Evaluation with inference example weighing, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from .statistics import apply, center, pool, pool_running, spread


def evaluate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    example_weight: float,
    channels_per_group: int,
    eps: float,
) -> Tensor:
    """Evaluation: running statistics, weighed with those of each example by itself.

    Args:
        x: input, (N, C, *S), not empty.
        weight: gamma, (C,), or None for 1.
        bias: beta, (C,), or None for 0.
        mask: True where an element counts, (N, *S), or None.
        running_mean: (C,).
        running_var: (C,).
        example_weight: alpha, the weight of the example's own statistics, in [0, 1].
        channels_per_group: consecutive channels that share statistics.
        eps: added to the variance.

    Returns:
        The output, shape and dtype of x; differentiable, through the example's own statistics too.
    """
    k = channels_per_group
    running = pool_running(running_mean, running_var, k)  # (1, K)
    view = x.unsqueeze(1)  # every example is a group: (G = N, 1, C, *S)
    view_mask = None if mask is None else mask[:, None, None]
    centered, drift, channel = center(view, view_mask)
    example = pool(channel, k)  # (N, K)
    alpha = example_weight if mask is None else (example.count > 0).to(running.var.dtype) * example_weight
    difference = example.mean - running.mean
    var = (1 - alpha) * running.var + alpha * example.var + alpha * (1 - alpha) * difference.square()
    # x - mean, with mean = mu + alpha * (e - mu), from the example's centered channels
    offset = channel.mean - spread(example.mean, k) - drift + spread((1 - alpha) * difference, k)
    scale = spread((var + eps).rsqrt(), k)
    y = apply(centered, scale, scale * offset, weight, bias)
    if view_mask is not None:
        y = y.where(view_mask, 0)
    return y.squeeze(1).to(x.dtype)
