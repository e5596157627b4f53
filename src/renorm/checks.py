"""Refusals: every input that cannot be normalized, by argument, value and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .grouping import Grouping


def check_input(x: Tensor, **per_channel: Tensor | None) -> None:
    """Refuse input that is not a batch of channels.

    Args:
        x: the input.
        **per_channel: parameters and statistics by name, (C,) each, or None.

    Raises:
        TypeError: x is not floating point.
        ValueError: x has no channel dimension, or another number of channels than a parameter.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (N, C, ...), got {tuple(x.shape)}")
    channels = x.shape[1:2]
    for name, tensor in per_channel.items():
        if tensor is not None and tensor.shape != channels:
            raise ValueError(
                f"x must have as many channels in dimension 1 as {name}, of shape {tuple(tensor.shape)}, "
                f"got {tuple(x.shape)}"
            )


def check_devices(x: Tensor, tensors: Iterable[Tensor | None]) -> None:
    """Refuse tensors of several devices.

    Args:
        x: the input.
        tensors: what goes with it.

    Raises:
        ValueError: one is on another device than x.
    """
    device = x.device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"mask, residual, parameters and statistics must be on x's device, {device}, got a tensor of shape "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )


def check_groups(x: Tensor, grouping: Grouping, *, corrected: bool) -> None:
    """Refuse a batch whose groups cannot be formed, or say nothing.

    Args:
        x: input, (N, C, *S).
        grouping: which elements share statistics.
        corrected: whether r and d give a group of one element a meaning.

    Raises:
        ValueError: the channels do not divide, or a group has one element and no correction.
    """
    check_channels(x.shape[1], grouping.channels_per_group)
    if corrected or x.numel() > x.shape[0] * x.shape[1]:  # several positions
        return
    examples = min(size for _, size in grouping.parts(x.shape[0]))
    if examples * grouping.channels_per_group * math.prod(x.shape[2:]) == 1:
        raise ValueError(
            f"training needs more than one element per statistics group, got x of shape {tuple(x.shape)} with "
            f"examples_per_group={grouping.examples_per_group}, channels_per_group={grouping.channels_per_group}; "
            "batch renormalization (limits=...) accepts single elements"
        )


def check_channels(num_channels: int, channels_per_group: int) -> None:
    """Refuse channels that do not divide into groups.

    Args:
        num_channels: number of channels.
        channels_per_group: consecutive channels that share statistics.

    Raises:
        ValueError: a remainder is left.
    """
    if num_channels % channels_per_group:
        raise ValueError(f"channels_per_group must divide the {num_channels} channels, got {channels_per_group}")


def check_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Refuse a mask that does not fit.

    Args:
        mask: True where an element counts; (N, *S) or broadcastable to it.
        x: input, (N, C, *S).

    Returns:
        The mask as (N, *S).

    Raises:
        TypeError: the mask is not boolean.
        ValueError: its shape does not fit.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean tensor, True where an element counts, got {mask.dtype}")
    shape = (x.shape[0], *x.shape[2:])
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > len(shape) or any(given not in (1, size) for given, size in sizes):
        raise ValueError(
            f"mask must have shape {shape}, that of x {tuple(x.shape)} without channels, or broadcast to it, "
            f"got {tuple(mask.shape)}"
        )
    return mask.expand(shape)


def check_residual(residual: Tensor | None, x: Tensor) -> None:
    """Refuse a residual of another shape, which would be broadcast.

    Args:
        residual: added to the normalized x, or None.
        x: input, (N, C, *S).

    Raises:
        ValueError: the shapes differ.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")


def check_example_weight(example_weight: float) -> None:
    """Refuse an example weight that is none.

    Args:
        example_weight: alpha.

    Raises:
        ValueError: it lies outside [0, 1].
    """
    if not 0 <= example_weight <= 1:
        raise ValueError(f"example_weight must be in [0, 1], got {example_weight}")


def check_eps(eps: float) -> None:
    """Refuse what would make the root of a variance no number.

    Args:
        eps: added to variances.

    Raises:
        ValueError: it is less than 0, or no number.
    """
    if not eps >= 0:
        raise ValueError(f"eps must be a number of at least 0, got {eps}")


def check_limits(r_max: float, d_max: float) -> None:
    """Refuse limits of the correction that leave it no room.

    Args:
        r_max: r stays within [1 / r_max, r_max].
        d_max: d stays within [-d_max, d_max].

    Raises:
        ValueError: r_max is less than 1, or d_max less than 0.
    """
    if not r_max >= 1:
        raise ValueError(f"r_max must be at least 1 (1 means no scaling), got {r_max}")
    if not d_max >= 0:
        raise ValueError(f"d_max must be at least 0 (0 means no shift), got {d_max}")
