"""Normalization of a batch on a GPU: one kernel where a program can hold a channel of a group, else two.

The first of two measures, the second settles the coefficients from what was measured and applies them. Where channels
share statistics a third stands between them, which settles each group once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .moments import coefficients_of, combine, load_counted, mean_of_tile, moments_of_splits, moments_of_tile
from .tiles import block_and_group, group_bounds, tile_at


@triton.jit
def measure(
    x, mask, measured, N, C, S, per_group, G, tiles, splits,
    CHANNELS_LAST: tl.constexpr, E: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    block, g = block_and_group(C, BC)
    begin, examples = group_bounds(g, N, per_group, G)
    c = block * BC + tl.arange(0, BC)
    share = tl.cdiv(tiles, splits)
    first = split * share
    offsets, at_mask, exists = tile_at(first, begin, examples, c, C, S, CHANNELS_LAST, E, RUN)
    values, counted = load_counted(x, mask, offsets, at_mask, exists, ACC, MASKED)
    shift = mean_of_tile(values, counted)
    # Welford's recurrence for every element of a tile, over the tiles
    counts = counted.to(ACC)
    means = tl.where(counted, values - shift[None, :], 0.0)
    m2s = tl.zeros((E, BC), ACC)
    for t in range(first + 1, tl.minimum(first + share, tiles)):
        offsets, at_mask, exists = tile_at(t, begin, examples, c, C, S, CHANNELS_LAST, E, RUN)
        values, counted = load_counted(x, mask, offsets, at_mask, exists, ACC, MASKED)
        counts += counted.to(ACC)
        values = values - shift[None, :]
        apart = values - means
        means += tl.where(counted, apart / tl.maximum(counts, 1.0), 0.0)
        m2s += tl.where(counted, apart * (values - means), 0.0)
    mean, m2, count = combine(means, m2s, counts)
    at = (g * splits + split) * C + c
    row = G * splits * C
    tl.store(measured + at, shift, mask=c < C)
    tl.store(measured + row + at, mean, mask=c < C)
    tl.store(measured + 2 * row + at, m2, mask=c < C)
    tl.store(measured + 3 * row + at, count, mask=c < C)


@triton.jit
def _keep_moments(mean, var, count, g, c, C, shift, rest, variance, counted):
    tl.store(mean + g * C + c, shift + rest, mask=c < C)
    tl.store(var + g * C + c, variance, mask=c < C)
    tl.store(count + g + c, counted, mask=c == 0)


@triton.jit
def _keep_coefficients(coefficients, at, row, exists, center, scale, offset, r, d, inverse_sigma):
    tl.store(coefficients + at, center, mask=exists)
    tl.store(coefficients + row + at, scale, mask=exists)
    tl.store(coefficients + 2 * row + at, offset, mask=exists)
    tl.store(coefficients + 3 * row + at, r, mask=exists)
    tl.store(coefficients + 4 * row + at, d, mask=exists)
    tl.store(coefficients + 5 * row + at, inverse_sigma, mask=exists)


@triton.jit
def _output(values, counted, center, scale, offset, residual, offsets, exists, RESIDUAL: tl.constexpr,
            ACT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    z = (values - center[None, :]) * scale[None, :] + offset[None, :]
    if RESIDUAL:
        z += tl.load(residual + offsets, mask=exists, other=0.0).to(z.dtype)
    z = activate(z, ACT)
    if MASKED:
        z = tl.where(counted, z, 0.0)
    return z


@triton.jit
def apply(
    x, mask, residual, y, measured, mean, var, count, coefficients, weight, bias, running_mean, running_var, r_given,
    d_given, r_max, d_max, alpha, N, C, S, per_group, G, tiles, splits, programs,
    EPS: tl.constexpr, SOURCE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, LIMITS_IN_MEMORY: tl.constexpr,
    SETTLED: tl.constexpr, KEEPS: tl.constexpr, SPLITS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, E: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1)
    block, g = block_and_group(C, BC)
    c = block * BC + tl.arange(0, BC)
    at, row = g * C + c, G * C
    if SETTLED:
        center = tl.load(coefficients + at, mask=c < C, other=0.0)
        scale = tl.load(coefficients + row + at, mask=c < C, other=0.0)
        offset = tl.load(coefficients + 2 * row + at, mask=c < C, other=0.0)
    else:
        if SOURCE == 4:
            shift = tl.zeros((BC,), ACC)
            rest, variance, number = shift, shift, shift
        else:
            shift, rest, variance, number = moments_of_splits(measured, g, c, C, G, splits, SPLITS)
        center, scale, offset, r, d, inverse_sigma = coefficients_of(
            shift, rest, variance, number, c, C, at, weight, bias, running_mean, running_var, r_given, d_given,
            r_max, d_max, alpha, EPS, SOURCE, WEIGHT, BIAS, LIMITS_IN_MEMORY,
        )  # fmt: skip
        if KEEPS:
            if program == 0:  # apart: Triton compiles both sides of an `and`
                _keep_moments(mean, var, count, g, c, C, shift, rest, variance, number)
                _keep_coefficients(coefficients, at, row, c < C, center, scale, offset, r, d, inverse_sigma)
    begin, examples = group_bounds(g, N, per_group, G)
    share = tl.cdiv(tiles, programs)
    last = tl.minimum((program + 1) * share, tiles) - 1
    for i in range(0, last + 1 - program * share):
        # The last tile first: it is the likeliest to be in the cache.
        offsets, at_mask, exists = tile_at(last - i, begin, examples, c, C, S, CHANNELS_LAST, E, RUN)
        values, counted = load_counted(x, mask, offsets, at_mask, exists, ACC, MASKED)
        z = _output(values, counted, center, scale, offset, residual, offsets, exists, RESIDUAL, ACT, MASKED)
        tl.store(y + offsets, z.to(y.dtype.element_ty), mask=exists)


@triton.jit
def apply_whole(
    x, mask, residual, y, mean, var, count, coefficients, weight, bias, running_mean, running_var, r_given, d_given,
    r_max, d_max, alpha, N, C, S, per_group, G,
    EPS: tl.constexpr, SOURCE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, LIMITS_IN_MEMORY: tl.constexpr,
    KEEPS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, E: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    block, g = block_and_group(C, BC)
    begin, examples = group_bounds(g, N, per_group, G)
    c = block * BC + tl.arange(0, BC)
    offsets, at_mask, exists = tile_at(0, begin, examples, c, C, S, CHANNELS_LAST, E, RUN)
    values, counted = load_counted(x, mask, offsets, at_mask, exists, ACC, MASKED)
    shift, rest, variance, counts = moments_of_tile(values, counted)
    at = g * C + c
    center, scale, offset, r, d, inverse_sigma = coefficients_of(
        shift, rest, variance, counts, c, C, at, weight, bias, running_mean, running_var, r_given, d_given,
        r_max, d_max, alpha, EPS, SOURCE, WEIGHT, BIAS, LIMITS_IN_MEMORY,
    )  # fmt: skip
    if KEEPS:
        _keep_moments(mean, var, count, g, c, C, shift, rest, variance, counts)
        _keep_coefficients(coefficients, at, G * C, c < C, center, scale, offset, r, d, inverse_sigma)
    z = _output(values, counted, center, scale, offset, residual, offsets, exists, RESIDUAL, ACT, MASKED)
    tl.store(y + offsets, z.to(y.dtype.element_ty), mask=exists)
