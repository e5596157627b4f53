"""Normalization of a batch on a GPU, in three kernels: measure, settle (in `settle`), apply.

The programs of the last take what those of the first took, and each the last row first, so that they begin with what
the second-level cache still holds. Where a program can hold a channel of a group, one kernel does all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .moments import (
    coefficients_of,
    combine,
    keep_coefficients,
    limits_now,
    load_counted,
    merge_along,
    merge_segments,
    moments_of_tile,
)
from .tiles import block_and_group, columns_of, counted_at, group_bounds, rows_of, tile_at, whole_tile
from .tracking import keep_facts, move_channels


@triton.jit(do_not_specialize=["units", "N", "S", "per_group", "G", "blocks", "share", "spans"])
def measure(
    x, mask, measured, units, N, S, per_group, G, blocks, share, spans,
    DIVISOR: tl.constexpr, PLANES: tl.constexpr, E: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Moments of the rows of a program, column by column, then of its channels; into a slot of each."""
    K = units * DIVISOR
    split = tl.program_id(1)
    block, g = block_and_group(blocks)
    above, first, rows = rows_of(g, split, N, S, per_group, G, share, PLANES)
    column, channel, exists = columns_of(block, K, S, PLANES, W)
    inside, ok = tl.arange(0, E)[:, None] * K + column[None, :], exists[None, :]
    wide = K.to(tl.int64)
    here, step = x + first * wide, E * wide
    rest, m2 = tl.zeros((E, W), ACC), tl.zeros((E, W), ACC)
    counts = tl.zeros((E, W if MASKED else 1), ACC)
    if MASKED:
        full = rows * 0
        shift = tl.zeros((E, W), ACC)  # of each element of the tile, from the first that counts
    else:
        # Four rows at a time, about an element of the channel.
        full = rows // (4 * E)
        origin = channel * S if PLANES else column
        shift = tl.load(x + above * wide + origin, mask=exists, other=0.0).to(ACC)[None, :]
        for i in range(0, full):
            one = tl.load(here + inside, mask=ok, other=0.0)
            two = tl.load(here + step + inside, mask=ok, other=0.0)
            three = tl.load(here + 2 * step + inside, mask=ok, other=0.0)
            four = tl.load(here + 3 * step + inside, mask=ok, other=0.0)
            here += 4 * step
            one, two, three, four = (
                one.to(ACC) - shift,
                two.to(ACC) - shift,
                three.to(ACC) - shift,
                four.to(ACC) - shift,
            )
            mean = ((one + two) + (three + four)) * 0.25
            one, two, three, four = one - mean, two - mean, three - mean, four - mean
            share_of_new = tl.full((), 1, ACC) / (i + 1)
            apart = mean - rest
            rest += apart * share_of_new
            m2 += ((one * one + two * two) + (three * three + four * four)) + apart * apart * (4 * i * share_of_new)
        counts += 4 * full
    for row in range(full * 4 * E, rows, E):
        counted = (row + tl.arange(0, E) < rows)[:, None]
        value = tl.load(here + inside, mask=counted & ok, other=0.0).to(ACC)
        here += step
        if MASKED:
            row_of_mask = first + row + tl.arange(0, E)
            if PLANES:
                at_mask = row_of_mask[:, None] * S + (column - channel * S)[None, :]
            else:
                at_mask = row_of_mask[:, None] + (column * 0)[None, :]
            counted = counted & ok & (tl.load(mask + at_mask, mask=counted & ok, other=0) != 0)
            shift = tl.where(counted & (counts == 0), value, shift)
        counts += counted.to(ACC)
        apart = (value - shift) - rest
        new = rest + tl.where(counted, apart / tl.maximum(counts, 1.0), 0.0)
        m2 += tl.where(counted, apart * ((value - shift) - new), 0.0)
        rest = new
    if MASKED:
        count, shift_of, mean, squares = merge_along(counts, shift, rest, m2, 0)
    else:
        mean, squares, count = combine(rest, m2, counts)
        shift_of, count = tl.sum(shift, 0), count + tl.zeros((W,), ACC)
    if PLANES:
        C, slots, slot = K // S, tl.num_programs(1) * spans, split * spans + block - channel * S // W
        position = column - channel * S
        begins = ((position == 0) | (column == block * W)).to(tl.int32)
        begins, count, shift_of, mean, squares = tl.associative_scan(
            (begins, count, shift_of, mean, squares), 0, merge_segments
        )
        exists = exists & ((position == S - 1) | (column == block * W + W - 1))
    else:
        C, slots, slot = K, tl.num_programs(1), split
    at, row_of = (g * C + channel) * slots + slot, tl.cast(G, tl.int64) * C * slots
    tl.store(measured + at, shift_of, mask=exists)
    tl.store(measured + row_of + at, mean, mask=exists)
    tl.store(measured + 2 * row_of + at, squares, mask=exists)
    tl.store(measured + 3 * row_of + at, count, mask=exists)


@triton.jit
def _write_output(
    x, mask, residual, y, first, rows, column, channel, exists, center, scale, offset, K, S, CHUNK: tl.constexpr,
    E: tl.constexpr, PLANES: tl.constexpr, MASKED: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Outputs of a chunk of tiles whose first row is `first` of the matrix."""
    inside, there = tile_at(column, exists, rows, K, CHUNK, E)
    base = first * K.to(tl.int64)
    # x is not needed again before the backward
    values = tl.load(x + base + inside, mask=there, other=0.0, eviction_policy="evict_first").to(ACC)
    z = (values - center[None, None, :]) * scale[None, None, :] + offset[None, None, :]
    if RESIDUAL:
        z += tl.load(residual + base + inside, mask=there, other=0.0, eviction_policy="evict_first").to(ACC)
    z = activate(z, ACT)
    if MASKED:
        z = tl.where(counted_at(mask, first, column, channel, S, there, PLANES, CHUNK, E), z, 0.0)
    tl.store(y + base + inside, z.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["units", "N", "S", "per_group", "G", "blocks", "share", "k", "faults"])
def apply(
    x, mask, residual, y, coefficients, running_mean, running_var, steps, skipped, mean, var, count, facts,
    units, N, S, per_group, G, blocks, share, k, faults,
    EPS: tl.constexpr, RULE: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr, CHUNK: tl.constexpr,
    DIVISOR: tl.constexpr, PLANES: tl.constexpr, E: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The output; and the first programs move the running statistics, which nobody reads any more."""
    K = units * DIVISOR
    block, g = block_and_group(blocks)
    split = tl.program_id(1)
    _above, first, rows = rows_of(g, split, N, S, per_group, G, share, PLANES)
    column, channel, exists = columns_of(block, K, S, PLANES, W)
    C = K // S if PLANES else K
    at, row = g * C + channel, tl.cast(G, tl.int64) * C
    center = tl.load(coefficients + at, mask=exists, other=0.0)
    scale = tl.load(coefficients + row + at, mask=exists, other=0.0)
    offset = tl.load(coefficients + 2 * row + at, mask=exists, other=0.0)
    full = rows // (CHUNK * E)
    for start in range(full * CHUNK * E, rows, E):
        _write_output(
            x, mask, residual, y, first + start, rows - start, column, channel, exists, center, scale, offset, K, S,
            1, E, PLANES, MASKED, RESIDUAL, ACT, ACC,
        )  # fmt: skip
    for i in range(0, full):
        start = (full - 1 - i) * CHUNK * E
        _write_output(
            x, mask, residual, y, first + start, CHUNK * E, column, channel, exists, center, scale, offset, K, S,
            CHUNK, E, PLANES, MASKED, RESIDUAL, ACT, ACC,
        )  # fmt: skip
    if RULE >= 0:
        programs = tl.num_programs(0) * tl.num_programs(1)
        move_channels(
            running_mean, running_var, steps, skipped, mean, var, count, facts, G, C, k,
            split * tl.num_programs(0) + tl.program_id(0), programs, faults, EPS, RULE, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "C", "S", "per_group", "G"])
def apply_whole(
    x, mask, residual, y, mean, var, count, coefficients, facts, weight, bias, running_mean, running_var, steps,
    r_given, d_given,
    r_max: tl.float64, d_max: tl.float64, start: tl.float64, r_end: tl.float64, d_end: tl.float64, alpha: tl.float64,
    momentum: tl.float64, N, C, S, per_group, G,
    EPS: tl.constexpr, SOURCE: tl.constexpr, LIMITS: tl.constexpr, CUMULATIVE: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, KEEPS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, E: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """All of it by a program that holds a channel's elements in a group."""
    block, g = block_and_group(tl.cdiv(C, BC))
    begin, examples = group_bounds(g, N, per_group, G)
    c = block * BC + tl.arange(0, BC)
    offsets, at_mask, exists = whole_tile(begin, examples, c, C, S, CHANNELS_LAST, E, RUN)
    values, counted = load_counted(x, mask, offsets, at_mask, exists, ACC, MASKED)
    shift, rest, variance, counts = moments_of_tile(values, counted)
    at = g * C + c
    high_r, high_d = tl.full((), 1.0, ACC), tl.full((), 0.0, ACC)
    if SOURCE == 1:
        high_r, high_d = limits_now(steps, r_given, d_given, r_max, d_max, start, r_end, d_end, LIMITS, ACC)
    center, scale, offset, r, d, inverse_sigma = coefficients_of(
        shift, rest, variance, counts, c, C, at, weight, bias, running_mean, running_var, r_given, d_given,
        high_r, high_d, alpha, EPS, SOURCE, WEIGHT, BIAS,
    )  # fmt: skip
    if KEEPS:
        tl.store(mean + at, shift + rest, mask=c < C)
        tl.store(var + at, variance, mask=c < C)
        tl.store(count + g + c, counts, mask=c == 0)
        keep_coefficients(coefficients, at, tl.cast(G, tl.int64) * C, c < C, center, scale, offset, r, d, inverse_sigma)
        keep_facts(facts, shift + rest + variance, c < C, steps, momentum, CUMULATIVE, ACC)
    z = (values - center[None, :]) * scale[None, :] + offset[None, :]
    if RESIDUAL:
        z += tl.load(residual + offsets, mask=exists, other=0.0).to(ACC)
    z = activate(z, ACT)
    if MASKED:
        z = tl.where(counted, z, 0.0)
    tl.store(y + offsets, z.to(y.dtype.element_ty), mask=exists)
