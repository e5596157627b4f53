"""Moments of tiles, of what several programs measured, and the coefficients that follow from them; for the kernels.

A mean is kept as a shift, which is near it, and the rest, so that no digit of the deviations is lost where the mean is
large.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Where scale and offset come from; the kernels know them by number.
BATCH, RENORM, GIVEN, WEIGHED, RUNNING = 0, 1, 2, 3, 4

# Rows of what a program measured of a channel: shift, rest, sum of squared deviations, count.
MEASURED = 4
# Rows of the coefficients: center, scale, offset, r, d, 1 / sigma.
COEFFICIENTS = 6


@triton.jit
def load_counted(x, mask, offsets, at_mask, exists, ACC: tl.constexpr, MASKED: tl.constexpr):
    """A tile's elements, 0 for those that do not count, and which do."""
    if MASKED:
        exists = exists & (tl.load(mask + at_mask, mask=exists, other=0) != 0)
    return tl.load(x + offsets, mask=exists, other=0.0).to(ACC), exists


@triton.jit
def mean_of_tile(values, counted):
    """The mean of each channel of a tile, 0 where nothing counts."""
    count = tl.sum(counted.to(values.dtype), 0)
    return tl.sum(tl.where(counted, values, 0.0), 0) / tl.maximum(count, 1.0)


@triton.jit
def combine(means, m2s, counts):
    """Mean, squared deviations and count of channels from those of their parts, along axis 0 (Chan et al. 1979)."""
    count = tl.sum(counts, 0)
    mean = tl.sum(counts * means, 0) / tl.maximum(count, 1.0)
    apart = means - mean[None, :]
    return mean, tl.sum(m2s + counts * apart * apart, 0), count


@triton.jit
def moments_of_tile(values, counted):
    """Shift, rest of the mean, variance and count of each channel of a tile that holds all its elements."""
    shift = mean_of_tile(values, counted)
    deviations = tl.where(counted, values - shift[None, :], 0.0)
    count = tl.sum(counted.to(values.dtype), 0)
    rest = tl.sum(deviations, 0) / tl.maximum(count, 1.0)
    deviations = tl.where(counted, deviations - rest[None, :], 0.0)
    return shift, rest, tl.sum(deviations * deviations, 0) / tl.maximum(count, 1.0), count


@triton.jit
def moments_of_splits(measured, g, c, C, G, splits, SPLITS: tl.constexpr):
    """The same from what the programs of a group measured, (MEASURED, G, splits, C)."""
    split = tl.arange(0, SPLITS)
    exists = (split < splits)[:, None] & (c < C)[None, :]
    at = (g * splits + split)[:, None] * C + c[None, :]
    row = G * splits * C
    counts = tl.load(measured + 3 * row + at, mask=exists, other=0.0)
    shifts = tl.load(measured + at, mask=exists, other=0.0)
    shift = tl.max(tl.where(counts > 0, shifts, float("-inf")), 0)  # of any that counted something
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    means = tl.where(counts > 0, (shifts - shift[None, :]) + tl.load(measured + row + at, mask=exists, other=0.0), 0.0)
    mean, m2, count = combine(means, tl.load(measured + 2 * row + at, mask=exists, other=0.0), counts)
    return shift, mean, m2 / tl.maximum(count, 1.0), count


@triton.jit
def clip(value, low, high):
    """Clipping that lets NaN through."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def normalizer(
    shift, rest, var, count, known_mean, known_var, r, d, r_max, d_max, alpha,
    EPS: tl.constexpr, SOURCE: tl.constexpr, LIMITS_IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """What groups are normalized by, ((x - center) - rest) * inverse_sigma * r + d.

    shift, rest, var and count are the groups' moments, known_mean and known_var the running statistics, r and d what
    was given: of each what the source needs.
    """
    if SOURCE == 1:
        if LIMITS_IN_MEMORY:
            r_max, d_max = tl.load(r_max).to(var.dtype), tl.load(d_max).to(var.dtype)
        inverse_target = 1 / tl.sqrt(known_var + EPS)
        r = clip(tl.sqrt(var + EPS) * inverse_target, 1 / r_max, r_max)
        d = clip(((shift - known_mean) + rest) * inverse_target, -d_max, d_max)
    elif SOURCE == 3:
        share = tl.where(count > 0, alpha, 0.0).to(var.dtype)
        apart = (shift - known_mean) + rest
        shift, rest = known_mean, share * apart
        var = (1 - share) * known_var + share * var + share * (1 - share) * apart * apart
    elif SOURCE == 4:
        shift, rest, var = known_mean, known_mean * 0, known_var
    return shift, rest, r, d, 1 / tl.sqrt(var + EPS)


@triton.jit
def affine(rest, r, d, inverse_sigma, weight, bias, c, exists, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """Scale and offset of channels: y = (x - center) * scale + offset."""
    scale = inverse_sigma * r
    offset = d - rest * scale
    if WEIGHT:
        gamma = tl.load(weight + c, mask=exists, other=1.0).to(scale.dtype)
        scale, offset = scale * gamma, offset * gamma
    if BIAS:
        offset = offset + tl.load(bias + c, mask=exists, other=0.0).to(offset.dtype)
    return scale, offset


@triton.jit
def coefficients_of(
    shift, rest, var, count, c, C, at_given, weight, bias, running_mean, running_var, r_given, d_given,
    r_max, d_max, alpha, EPS: tl.constexpr, SOURCE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    LIMITS_IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """Center, scale, offset, r, d and 1 / sigma of channels that are groups by themselves."""
    exists = c < C
    known_mean, known_var = shift, var
    if SOURCE == 1 or SOURCE == 3 or SOURCE == 4:
        known_mean = tl.load(running_mean + c, mask=exists, other=0.0).to(var.dtype)
        known_var = tl.load(running_var + c, mask=exists, other=1.0).to(var.dtype)
    r, d = var * 0 + 1, var * 0
    if SOURCE == 2:
        r = tl.load(r_given + at_given, mask=exists, other=1.0).to(var.dtype)
        d = tl.load(d_given + at_given, mask=exists, other=0.0).to(var.dtype)
    center, rest, r, d, inverse_sigma = normalizer(
        shift, rest, var, count, known_mean, known_var, r, d, r_max, d_max, alpha, EPS, SOURCE, LIMITS_IN_MEMORY
    )
    scale, offset = affine(rest, r, d, inverse_sigma, weight, bias, c, exists, WEIGHT, BIAS)
    return center, scale, offset, r, d, inverse_sigma
