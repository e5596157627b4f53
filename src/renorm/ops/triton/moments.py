"""Moments of tiles and of their parts, and the coefficients that follow from them; for the kernels.

A mean is kept as a shift, which is near it, and the rest, so that no digit of the deviations is lost where the mean is
large. What a program measured of a channel is a slot of `measured`, (4, G, C, slots): shift, rest, sum of squared
deviations, count.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Where scale and offset come from; the kernels know them by number.
BATCH, RENORM, GIVEN, WEIGHED, RUNNING = 0, 1, 2, 3, 4

# Where the limits of the correction come from: numbers, numbers by the step, memory.
CONSTANT, RAMP, IN_MEMORY = 0, 1, 2

# Rows of what a program measured of a channel, and sums of gradients.
MEASURED, SUMMED = 4, 3
# Rows of the coefficients: center, scale, offset, r, d, 1 / sigma.
COEFFICIENTS = 6


@triton.jit
def merge(count, shift, rest, m2, other_count, other_shift, other_rest, other_m2):
    """Count, mean (shift and rest) and squared deviations of two parts together (Chan et al. 1979)."""
    near = tl.where(count > 0, shift, other_shift)
    mean = tl.where(count > 0, rest, other_rest)
    total = count + other_count
    apart = tl.where(count * other_count > 0, (other_shift - near) + (other_rest - mean), 0.0)
    share = other_count / tl.maximum(total, 1.0)
    return total, near, mean + apart * share, m2 + other_m2 + apart * apart * count * share


@triton.jit
def merge_segments(begins, count, shift, rest, m2, other_begins, other_count, other_shift, other_rest, other_m2):
    """The same for a scan over segments: where the other begins one, what came before is not of it."""
    # Not by `merge`, whose count of 0 would say the same: that takes registers which the scan has not left.
    begin = other_begins != 0
    both = (count * other_count > 0) & (begin == 0)
    total = tl.where(begin, other_count, count + other_count)
    keeps = (count > 0) & (begin == 0)
    near, mean = tl.where(keeps, shift, other_shift), tl.where(keeps, rest, other_rest)
    apart = tl.where(both, (other_shift - near) + (other_rest - mean), 0.0)
    share = other_count / tl.maximum(total, 1.0)
    squares = tl.where(begin, other_m2, m2 + other_m2 + apart * apart * count * share)
    return begins | other_begins, total, near, mean + apart * share, squares


@triton.jit
def add_segments(begins, sums, other_begins, other_sums):
    """Sums for a scan over segments."""
    return begins | other_begins, tl.where(other_begins != 0, other_sums, sums + other_sums)


@triton.jit
def combine(means, m2s, counts):
    """Mean, squared deviations and count of columns from those of their parts about one shift, along axis 0."""
    count = tl.sum(counts, 0)
    mean = tl.sum(counts * means, 0) / tl.maximum(count, 1.0)
    apart = means - mean[None, :]
    return mean, tl.sum(m2s + counts * apart * apart, 0), count


@triton.jit
def merge_along(count, shift, rest, m2, AXIS: tl.constexpr):
    """Count, shift, rest of the mean and squared deviations of all parts along an axis, each about its own shift."""
    near = tl.max(tl.where(count > 0, shift, float("-inf")), AXIS)  # of any that counted something
    near = tl.where(near == float("-inf"), 0.0, near)
    means = tl.where(count > 0, (shift - tl.expand_dims(near, AXIS)) + rest, 0.0)
    total = tl.sum(count, AXIS)
    mean = tl.sum(count * means, AXIS) / tl.maximum(total, 1.0)
    apart = means - tl.expand_dims(mean, AXIS)
    return total, near, mean, tl.sum(m2 + count * apart * apart, AXIS)


@triton.jit
def load_counted(x, mask, offsets, at_mask, exists, ACC: tl.constexpr, MASKED: tl.constexpr):
    """A tile's elements, 0 for those that do not exist, and which count."""
    if MASKED:
        exists = exists & (tl.load(mask + at_mask, mask=exists, other=0) != 0)
    return tl.load(x + offsets, mask=exists, other=0.0).to(ACC), exists


@triton.jit
def moments_of_tile(values, counted):
    """Shift, rest of the mean, variance and count of each channel of a tile that holds all its elements."""
    count = tl.sum(counted.to(values.dtype), 0)
    shift = tl.sum(tl.where(counted, values, 0.0), 0) / tl.maximum(count, 1.0)
    deviations = tl.where(counted, values - shift[None, :], 0.0)
    rest = tl.sum(deviations, 0) / tl.maximum(count, 1.0)
    deviations = tl.where(counted, deviations - rest[None, :], 0.0)
    return shift, rest, tl.sum(deviations * deviations, 0) / tl.maximum(count, 1.0), count


@triton.jit
def slots_at(start, g, c, C, S, slots, spans, PLANES: tl.constexpr, W: tl.constexpr, SLOTS: tl.constexpr):
    """Slots from `start` of the channels c, (channels, SLOTS): where they are, and which were written."""
    slot = start + tl.arange(0, SLOTS)
    written = (c < C)[:, None] & (slot < slots)[None, :]
    if PLANES:
        first, last = c * S // W, (c * S + S - 1) // W
        written = written & (first[:, None] + (slot % spans)[None, :] <= last[:, None])
    return (g * C + c)[:, None] * slots + slot[None, :], written


@triton.jit
def moments_of_slots(
    measured, g, c, C, S, G, slots, spans, PLANES: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
    SLOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Shift, rest, variance and count of the channels c (BC,) in a group, from what its programs measured."""
    row = tl.cast(G, tl.int64) * C * slots
    count, shift = tl.zeros((BC, SLOTS), ACC), tl.zeros((BC, SLOTS), ACC)
    rest, m2 = tl.zeros((BC, SLOTS), ACC), tl.zeros((BC, SLOTS), ACC)
    for start in range(0, slots, SLOTS):
        at, written = slots_at(start, g, c, C, S, slots, spans, PLANES, W, SLOTS)
        count, shift, rest, m2 = merge(
            count, shift, rest, m2,
            tl.load(measured + 3 * row + at, mask=written, other=0.0),
            tl.load(measured + at, mask=written, other=0.0),
            tl.load(measured + row + at, mask=written, other=0.0),
            tl.load(measured + 2 * row + at, mask=written, other=0.0),
        )  # fmt: skip
    count, shift, rest, m2 = merge_along(count, shift, rest, m2, 1)
    return shift, rest, m2 / tl.maximum(count, 1.0), count


@triton.jit
def sums_of_slots(
    summed, g, c, C, S, G, slots, spans, PLANES: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
    SLOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of g, x - center and their product of the channels c (BC,) in a group."""
    row = tl.cast(G, tl.int64) * C * slots
    gradient, centered = tl.zeros((BC, SLOTS), ACC), tl.zeros((BC, SLOTS), ACC)
    product = tl.zeros((BC, SLOTS), ACC)
    for start in range(0, slots, SLOTS):
        at, written = slots_at(start, g, c, C, S, slots, spans, PLANES, W, SLOTS)
        gradient += tl.load(summed + at, mask=written, other=0.0)
        centered += tl.load(summed + row + at, mask=written, other=0.0)
        product += tl.load(summed + 2 * row + at, mask=written, other=0.0)
    return tl.sum(gradient, 1), tl.sum(centered, 1), tl.sum(product, 1)


@triton.jit
def clip(value, low, high):
    """Clipping that lets NaN through."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def _limit_at(step, low, high, start, end):
    """`Limits.at`, in float64."""
    share = (step - start) / tl.maximum(end - start, 1.0)
    endless = high == float("inf")
    ramp = low + tl.where(endless, share / tl.maximum(1 - share, 1e-300), (tl.where(endless, low, high) - low) * share)
    return tl.where(step < start, low, tl.where(step >= end, high, ramp))


@triton.jit
def limits_now(
    steps, r_in_memory, d_in_memory, r_max, d_max, start, r_end, d_end, LIMITS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """r_max and d_max of this batch."""
    if LIMITS == 2:
        high_r, high_d = tl.load(r_in_memory), tl.load(d_in_memory)
    else:
        high_r, high_d = tl.full((), r_max, tl.float64), tl.full((), d_max, tl.float64)
    if LIMITS == 1:
        step, begin = tl.load(steps).to(tl.float64), tl.full((), start, tl.float64)
        high_r = _limit_at(step, 1.0, high_r, begin, tl.full((), r_end, tl.float64))
        high_d = _limit_at(step, 0.0, high_d, begin, tl.full((), d_end, tl.float64))
    return high_r.to(ACC), high_d.to(ACC)


@triton.jit
def normalizer(
    shift, rest, var, count, known_mean, known_var, r, d, r_max, d_max, alpha, EPS: tl.constexpr, SOURCE: tl.constexpr
):
    """What groups are normalized by, ((x - center) - rest) * inverse_sigma * r + d.

    shift, rest, var and count are the groups' moments, known_mean and known_var the running statistics, r and d what
    was given: of each what the source needs.
    """
    if SOURCE == 1:
        inverse_target = 1 / tl.sqrt(known_var + EPS)
        r = clip(tl.sqrt(var + EPS) * inverse_target, 1 / r_max, r_max)
        d = clip(((shift - known_mean) + rest) * inverse_target, -d_max, d_max)
    elif SOURCE == 3:
        share = tl.where(count > 0, tl.full((), alpha, var.dtype), 0.0)
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
        shift, rest, var, count, known_mean, known_var, r, d, r_max, d_max, alpha, EPS, SOURCE
    )
    scale, offset = affine(rest, r, d, inverse_sigma, weight, bias, c, exists, WEIGHT, BIAS)
    return center, scale, offset, r, d, inverse_sigma


@triton.jit
def keep_coefficients(coefficients, at, row, exists, center, scale, offset, r, d, inverse_sigma):
    """Write the rows of `schema.Coefficients`."""
    tl.store(coefficients + at, center, mask=exists)
    tl.store(coefficients + row + at, scale, mask=exists)
    tl.store(coefficients + 2 * row + at, offset, mask=exists)
    tl.store(coefficients + 3 * row + at, r, mask=exists)
    tl.store(coefficients + 4 * row + at, d, mask=exists)
    tl.store(coefficients + 5 * row + at, inverse_sigma, mask=exists)
