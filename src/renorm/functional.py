"""Normalization without state: what the layers do, as functions of their inputs."""

from __future__ import annotations

from torch import Tensor

from .activation import Activation
from .checks import check_channels, check_input, check_limits
from .grouping import Grouping
from .moments import Moments, accumulation_dtype
from .ops.dispatch import evaluate, normalize
from .ops.problem import Correction, Inputs, Running, Settings, Target
from .ops.tracking import update_running

__all__ = ["batch_norm", "batch_renorm", "renormalize", "update_running", "weighted_batch_norm"]


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    examples_per_group: int | None = None,
    channels_per_group: int = 1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: Activation | None = None,
) -> tuple[Tensor, Moments]:
    """Normalize by the statistics of the batch, or of groups within it.

    Batch norm, ghost batch norm (`examples_per_group`), group norm (`examples_per_group=1`, `channels_per_group`),
    layer norm, instance norm and batch-group norm.

    Args:
        x: input, (N, C, *S), floating point.
        weight: gamma, (C,); None for 1.
        bias: beta, (C,); None for 0.
        mask: True where an element counts, (N, *S) or broadcastable to it; None for everywhere.
        examples_per_group: consecutive examples that share statistics; None for all.
        channels_per_group: consecutive channels that share statistics.
        eps: added to the variance.
        residual: added before the activation, shape of x; None for nothing.
        act: activation applied last, by name; None for none.

    Returns:
        The output, shape and dtype of x, 0 where masked; and the moments of every channel in every example
        group, (G, C), constants for autograd.

    Raises:
        TypeError: x is not floating point, or the mask not boolean.
        ValueError: a shape does not fit, or a group has a single element.

    Source:
        Ioffe & Szegedy 2015; Summers & Dinneen 2020, sections 3.2 and 3.4.

    Example:
        >>> import torch
        >>> y, moments = batch_norm(torch.tensor([[1.0], [3.0]]), eps=0.0)
        >>> y.tolist(), moments.mean.item(), moments.var.item()
        ([[-1.0], [1.0]], 2.0, 1.0)
    """
    settings = Settings(Grouping(examples_per_group, channels_per_group), eps, act)
    return normalize(Inputs(x, weight, bias, mask, residual), settings, None)


def batch_renorm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    r_max: float | Tensor,
    d_max: float | Tensor,
    mask: Tensor | None = None,
    examples_per_group: int | None = None,
    channels_per_group: int = 1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: Activation | None = None,
) -> tuple[Tensor, Moments]:
    """Normalize by the statistics of the batch, corrected towards the running statistics.

    x_hat = (x - mean) / sigma * r + d, with r = sigma / running_sigma and d = (mean - running_mean) / running_sigma,
    clipped and without gradient. Where neither is clipped the output is that of evaluation.

    Args:
        x: input, (N, C, *S), floating point.
        running_mean: (C,), from before this batch.
        running_var: (C,), from before this batch.
        weight: gamma, (C,); None for 1.
        bias: beta, (C,); None for 0.
        r_max: r is clipped to [1 / r_max, r_max]; at least 1.
        d_max: d is clipped to [-d_max, d_max]; at least 0.
        mask: True where an element counts, (N, *S) or broadcastable to it; None for everywhere.
        examples_per_group: consecutive examples that share statistics; None for all.
        channels_per_group: consecutive channels that share statistics; such a group's running mean and variance
            are the pooled ones of its channels.
        eps: added to the variances.
        residual: added before the activation, shape of x; None for nothing.
        act: activation applied last, by name; None for none.

    Returns:
        The output, shape and dtype of x, 0 where masked; and the moments of every channel in every example
        group, (G, C), constants for autograd. A group of one element yields bias + weight * d.

    Raises:
        TypeError: x is not floating point, or the mask not boolean.
        ValueError: a shape does not fit, or a limit that is a number leaves no room.

    Source:
        Ioffe 2017, algorithm 1.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> y, _ = batch_renorm(x, torch.tensor([1.0]), torch.tensor([4.0]), r_max=3, d_max=5, eps=0.0)
        >>> y.tolist()  # (x - 1) / 2
        [[0.0], [1.0]]
    """
    if not (isinstance(r_max, Tensor) or isinstance(d_max, Tensor)):  # asking a tensor would wait for its device
        check_limits(r_max, d_max)
    settings = Settings(Grouping(examples_per_group, channels_per_group), eps, act)
    target = Target(running_mean, running_var, r_max, d_max)
    return normalize(Inputs(x, weight, bias, mask, residual), settings, target)


def renormalize(
    x: Tensor,
    r: Tensor,
    d: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    examples_per_group: int | None = None,
    channels_per_group: int = 1,
    eps: float = 1e-5,
) -> tuple[Tensor, Moments]:
    """Normalize by the statistics of the batch, then scale by r and shift by d, which are given.

    Args:
        x: input, (N, C, *S), floating point.
        r: factor of the scale, (G, K): one number per example group and channel group; no gradient flows to it.
        d: shift, (G, K); no gradient flows to it.
        weight: gamma, (C,); None for 1.
        bias: beta, (C,); None for 0.
        mask: True where an element counts, (N, *S) or broadcastable to it; None for everywhere.
        examples_per_group: consecutive examples that share statistics; None for all.
        channels_per_group: consecutive channels that share statistics.
        eps: added to the variance.

    Returns:
        The output, shape and dtype of x, 0 where masked; and the moments of every channel in every example
        group, (G, C), constants for autograd.

    Raises:
        TypeError: x is not floating point, or the mask not boolean.
        ValueError: a shape does not fit.

    Source:
        Ioffe 2017, section 3.

    Example:
        >>> import torch
        >>> y, _ = renormalize(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5]]), torch.tensor([[0.5]]), eps=0.0)
        >>> y.tolist()
        [[0.0], [1.0]]
    """
    check_input(x)
    grouping = Grouping(examples_per_group, channels_per_group)
    check_channels(x.shape[1], channels_per_group)
    shape = (sum(groups for groups, _ in grouping.parts(x.shape[0])), x.shape[1] // channels_per_group)
    for name, value in (("r", r), ("d", d)):
        if value.shape != shape:
            raise ValueError(f"{name} must have one number per group, shape {shape}, got {tuple(value.shape)}")
    wide = accumulation_dtype(x.dtype)
    correction = Correction(r.detach().to(wide), d.detach().to(wide))
    return normalize(Inputs(x, weight, bias, mask), Settings(grouping, eps), correction)


def weighted_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    example_weight: float = 0.0,
    mask: Tensor | None = None,
    channels_per_group: int = 1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: Activation | None = None,
) -> Tensor:
    """Evaluate: normalize by the running statistics, weighed with the statistics of each example by itself.

    Every output depends on its own example only. An example weight of 0 is batch norm's ordinary evaluation,
    bit for bit; 1 is instance norm, or group norm with `channels_per_group`.

    Args:
        x: input, (N, C, *S), floating point.
        running_mean: (C,).
        running_var: (C,).
        weight: gamma, (C,); None for 1.
        bias: beta, (C,); None for 0.
        example_weight: alpha, the weight of the example's own statistics, in [0, 1].
        mask: True where an element counts, (N, *S) or broadcastable to it; None for everywhere. An example that
            is masked wholly has no statistics, and weighs nothing.
        channels_per_group: consecutive channels that share statistics.
        eps: added to the variance.
        residual: added before the activation, shape of x; None for nothing.
        act: activation applied last, by name; None for none.

    Returns:
        The output, shape and dtype of x, 0 where masked.

    Raises:
        TypeError: x is not floating point, or the mask not boolean.
        ValueError: a shape does not fit, or `example_weight` is outside [0, 1].

    Source:
        Summers & Dinneen 2020, section 3.1, equation 3.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[0.0, 2.0]]])
        >>> mean, var = torch.tensor([3.0]), torch.tensor([1.0])
        >>> weighted_batch_norm(x, mean, var, eps=0.0).tolist()
        [[[-3.0, -1.0]]]
        >>> weighted_batch_norm(x, mean, var, example_weight=1.0, eps=0.0).tolist()
        [[[-1.0, 1.0]]]
    """
    settings = Settings(Grouping(None, channels_per_group), eps, act)
    running = Running(running_mean, running_var)
    return evaluate(Inputs(x, weight, bias, mask, residual), settings, running, example_weight)
