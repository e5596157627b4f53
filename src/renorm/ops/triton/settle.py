"""What channels that share statistics are normalized by: one program for each group, between the two passes."""

from __future__ import annotations

import triton
import triton.language as tl

from .moments import affine, moments_of_splits, normalizer
from .tiles import block_and_group

BLOCK = 64  # channels of a group at a time


@triton.jit
def _merge_running(running_mean, running_var, first, k, ACC: tl.constexpr, BK: tl.constexpr):
    """Law of total variance over the channels [first, first + k)."""
    mean, var = tl.zeros((), ACC), tl.zeros((), ACC)
    for i in range(0, k, BK):
        c, own = first + i + tl.arange(0, BK), i + tl.arange(0, BK) < k
        mean += tl.sum(tl.load(running_mean + c, mask=own, other=0.0).to(ACC), 0) / k
    for i in range(0, k, BK):
        c, own = first + i + tl.arange(0, BK), i + tl.arange(0, BK) < k
        apart = tl.load(running_mean + c, mask=own, other=0.0).to(ACC) - mean
        each = tl.load(running_var + c, mask=own, other=0.0).to(ACC) + apart * apart
        var += tl.sum(tl.where(own, each, 0.0), 0) / k
    return mean, var


@triton.jit
def settle(
    measured, mean, var, count, coefficients, weight, bias, running_mean, running_var, r_given, d_given, r_max, d_max,
    alpha, C, G, splits, k,
    EPS: tl.constexpr, SOURCE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, LIMITS_IN_MEMORY: tl.constexpr,
    KEEPS: tl.constexpr, SPLITS: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    j, g = block_and_group(C, k)
    first = j * k
    near, merged, variance = tl.zeros((), ACC), tl.zeros((), ACC), tl.zeros((), ACC)
    counted = tl.zeros((), ACC)
    if SOURCE != 4:
        for i in range(0, k, BK):
            own = i + tl.arange(0, BK) < k
            c = tl.minimum(first + i + tl.arange(0, BK), first + k - 1)
            shift, rest, _, counts = moments_of_splits(measured, g, c, C, G, splits, SPLITS)
            if i == 0:
                near = tl.sum(tl.where(c == first, tl.where(own, shift, 0.0), 0.0), 0)
                counted = tl.max(counts, 0)
            merged += tl.sum(tl.where(own, (shift - near) + rest, 0.0), 0) / k
        for i in range(0, k, BK):
            own = i + tl.arange(0, BK) < k
            c = tl.minimum(first + i + tl.arange(0, BK), first + k - 1)
            shift, rest, each, _ = moments_of_splits(measured, g, c, C, G, splits, SPLITS)
            apart = ((shift - near) + rest) - merged
            variance += tl.sum(tl.where(own, each + apart * apart, 0.0), 0) / k
            if KEEPS:
                tl.store(mean + g * C + c, shift + rest, mask=own)
                tl.store(var + g * C + c, each, mask=own)
    known_mean, known_var = near, variance
    if SOURCE == 1 or SOURCE == 3 or SOURCE == 4:
        known_mean, known_var = _merge_running(running_mean, running_var, first, k, ACC, BK)
    r, d = tl.full((), 1.0, ACC), tl.zeros((), ACC)
    if SOURCE == 2:
        r = tl.load(r_given + g * (C // k) + j).to(ACC)
        d = tl.load(d_given + g * (C // k) + j).to(ACC)
    center, rest, r, d, inverse_sigma = normalizer(
        near, merged, variance, counted, known_mean, known_var, r, d, r_max, d_max, alpha, EPS, SOURCE,
        LIMITS_IN_MEMORY,
    )  # fmt: skip
    row = G * C
    for i in range(0, k, BK):
        c, own = first + i + tl.arange(0, BK), i + tl.arange(0, BK) < k
        at, ones = coefficients + g * C + c, tl.full((BK,), 1.0, ACC)
        scale, offset = affine(rest * ones, r, d, inverse_sigma, weight, bias, c, own, WEIGHT, BIAS)
        tl.store(at, center * ones, mask=own)
        tl.store(at + row, scale, mask=own)
        tl.store(at + 2 * row, offset, mask=own)
        tl.store(at + 3 * row, r * ones, mask=own)
        tl.store(at + 4 * row, d * ones, mask=own)
        tl.store(at + 5 * row, inverse_sigma * ones, mask=own)
    if KEEPS:
        if j == 0:
            tl.store(count + g, counted)


@triton.jit
def settle_backward(
    measured, count, coefficients, weight, slopes, per_group_gradients, C, G, splits, k,
    WEIGHT: tl.constexpr, SPLITS: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    j, g = block_and_group(C, k)
    first, row = j * k, G * C
    total = tl.load(count + g) * k
    share = 1 / tl.maximum(total, 1.0)
    r = tl.load(coefficients + 3 * row + g * C + first)
    d = tl.load(coefficients + 4 * row + g * C + first)
    inverse_sigma = tl.load(coefficients + 5 * row + g * C + first)
    rest = tl.zeros((), ACC)
    for i in range(0, k, BK):
        own = i + tl.arange(0, BK) < k
        c = tl.minimum(first + i + tl.arange(0, BK), first + k - 1)
        _, centered, _ = sums_of_splits(measured, g, c, C, G, splits, SPLITS)
        rest += tl.sum(tl.where(own, centered, 0.0), 0) * share
    mean_g, mean_gz = tl.zeros((), ACC), tl.zeros((), ACC)
    for i in range(0, k, BK):
        own = i + tl.arange(0, BK) < k
        c = tl.minimum(first + i + tl.arange(0, BK), first + k - 1)
        gradient, _, product = sums_of_splits(measured, g, c, C, G, splits, SPLITS)
        dot = product - rest * gradient
        tl.store(per_group_gradients + g * C + c, dot * inverse_sigma * r + gradient * d, mask=own)
        tl.store(per_group_gradients + row + g * C + c, gradient, mask=own)
        if WEIGHT:
            gamma = tl.load(weight + c).to(ACC)
            gradient, dot = gradient * gamma, dot * gamma
        mean_g += tl.sum(tl.where(own, gradient, 0.0), 0) * share
        mean_gz += tl.sum(tl.where(own, dot, 0.0), 0) * inverse_sigma * share
    scale = tl.where(total > 1, inverse_sigma * r, 0.0)
    slope = -scale * inverse_sigma * mean_gz
    constant = -scale * mean_g - slope * rest
    for i in range(0, k, BK):
        c, own = first + i + tl.arange(0, BK), i + tl.arange(0, BK) < k
        gradient = tl.full((BK,), 1.0, ACC) * scale
        if WEIGHT:
            gradient = gradient * tl.load(weight + c, mask=own, other=1.0).to(ACC)
        at = slopes + g * C + c
        tl.store(at, gradient, mask=own)
        tl.store(at + row, tl.full((BK,), 1.0, ACC) * slope, mask=own)
        tl.store(at + 2 * row, tl.full((BK,), 1.0, ACC) * constant, mask=own)


@triton.jit
def sums_of_splits(measured, g, c, C, G, splits, SPLITS: tl.constexpr):
    """Sums of g, x - center and their product, from those of a group's programs, (3, G, splits, C)."""
    split = tl.arange(0, SPLITS)
    exists = (split < splits)[:, None] & (c < C)[None, :]
    at = (g * splits + split)[:, None] * C + c[None, :]
    row = G * splits * C
    gradient = tl.sum(tl.load(measured + at, mask=exists, other=0.0), 0)
    centered = tl.sum(tl.load(measured + row + at, mask=exists, other=0.0), 0)
    return gradient, centered, tl.sum(tl.load(measured + 2 * row + at, mask=exists, other=0.0), 0)
