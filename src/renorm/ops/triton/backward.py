"""Gradients of normalization on a GPU, in three kernels: sums, settle (in `settle`), differences; or one for all.

As forwards, the last takes the rows in the reverse order. Where the residual wants its gradient, the first writes it,
which is the gradient before the activation, and the last reads it in place of all that it was made of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import backpropagate
from .moments import add_segments
from .settle import slopes_of
from .tiles import block_and_group, columns_of, counted_at, group_bounds, rows_of, tile_at, whole_tile


@triton.jit
def _gradient(gradient, centered, residual, y, offsets, there, scale, offset, RESIDUAL: tl.constexpr,
              FROM_Y: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The gradient before the activation; scale and offset have the tile's dimensions."""
    if ACT != 0:
        if FROM_Y:
            z = tl.load(y + offsets, mask=there, other=0.0).to(ACC)
        else:
            z = centered * scale + offset
            if RESIDUAL:
                z += tl.load(residual + offsets, mask=there, other=0.0).to(ACC)
        gradient = backpropagate(gradient, z, ACT)
    return gradient


@triton.jit
def _load_gradient(
    dy, x, mask, residual, y, first, rows, column, channel, exists, center, scale, offset, K, S, CHUNK: tl.constexpr,
    E: tl.constexpr, PLANES: tl.constexpr, MASKED: tl.constexpr, RESIDUAL: tl.constexpr, FROM_Y: tl.constexpr,
    ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A chunk's gradient before the activation and x - center, both 0 where nothing counts; offsets, what there is."""
    inside, there = tile_at(column, exists, rows, K, CHUNK, E)
    offsets = first * K.to(tl.int64) + inside
    gradient = tl.load(dy + offsets, mask=there, other=0.0).to(ACC)
    centered = tl.load(x + offsets, mask=there, other=0.0).to(ACC) - center[None, None, :]
    gradient = _gradient(
        gradient, centered, residual, y, offsets, there, scale[None, None, :], offset[None, None, :], RESIDUAL, FROM_Y,
        ACT, ACC,
    )  # fmt: skip
    counted = there
    if MASKED:
        counted = counted_at(mask, first, column, channel, S, there, PLANES, CHUNK, E)
    if MASKED or CHUNK == 1:  # of the others only columns may not exist, which nobody looks at
        gradient, centered = tl.where(counted, gradient, 0.0), tl.where(counted, centered, 0.0)
    return gradient, centered, offsets, there, counted


@triton.jit
def _sum_chunk(
    dy, x, mask, residual, y, dresidual, first, rows, column, channel, exists, center, scale, offset, K, S,
    WRITES: tl.constexpr, CHUNK: tl.constexpr, E: tl.constexpr, PLANES: tl.constexpr, MASKED: tl.constexpr,
    RESIDUAL: tl.constexpr, FROM_Y: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over the tiles of a chunk: of g, of x - center, of their product; and g itself, where it is wanted."""
    gradient, centered, offsets, there, _counted = _load_gradient(
        dy, x, mask, residual, y, first, rows, column, channel, exists, center, scale, offset, K, S, CHUNK, E, PLANES,
        MASKED, RESIDUAL, FROM_Y, ACT, ACC,
    )  # fmt: skip
    if WRITES:
        gradient = _written(dresidual, offsets, gradient, there, ACC)
    return tl.sum(gradient, 0), tl.sum(centered, 0), tl.sum(gradient * centered, 0)


@triton.jit
def _written(dresidual, offsets, gradient, there, ACC: tl.constexpr):
    """The gradient as it was stored, which is what is read later."""
    stored = gradient.to(dresidual.dtype.element_ty)
    tl.store(dresidual + offsets, stored, mask=there)
    return stored.to(ACC)


@triton.jit
def _load_row(coefficients, row, at, exists):
    return tl.load(coefficients + row + at, mask=exists, other=0.0)


@triton.jit(do_not_specialize=["units", "N", "S", "per_group", "G", "blocks", "share", "spans"])
def sum_gradients(
    dy, x, mask, residual, y, coefficients, summed, dresidual, units, N, S, per_group, G, blocks, share, spans,
    WRITES: tl.constexpr, RESIDUAL: tl.constexpr, FROM_Y: tl.constexpr, ACT: tl.constexpr, CHUNK: tl.constexpr,
    DIVISOR: tl.constexpr, PLANES: tl.constexpr, E: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of a program: of g, of x - center, of their product; into a slot of each channel."""
    K = units * DIVISOR
    split = tl.program_id(1)
    block, g = block_and_group(blocks)
    _above, first, rows = rows_of(g, split, N, S, per_group, G, share, PLANES)
    column, channel, exists = columns_of(block, K, S, PLANES, W)
    C = K // S if PLANES else K
    at, row = g * C + channel, tl.cast(G, tl.int64) * C
    center = _load_row(coefficients, 0, at, exists)
    scale, offset = center, center
    if ACT != 0 and not FROM_Y:
        scale, offset = _load_row(coefficients, row, at, exists), _load_row(coefficients, 2 * row, at, exists)
    gradients, centereds, products = tl.zeros((E, W), ACC), tl.zeros((E, W), ACC), tl.zeros((E, W), ACC)
    full = rows // (CHUNK * E)
    for i in range(0, full):
        gradient, centered, product = _sum_chunk(
            dy, x, mask, residual, y, dresidual, first + i * (CHUNK * E), CHUNK * E, column, channel, exists, center,
            scale, offset, K, S, WRITES, CHUNK, E, PLANES, MASKED, RESIDUAL, FROM_Y, ACT, ACC,
        )  # fmt: skip
        gradients, centereds, products = gradients + gradient, centereds + centered, products + product
    for start in range(full * CHUNK * E, rows, E):
        gradient, centered, product = _sum_chunk(
            dy, x, mask, residual, y, dresidual, first + start, rows - start, column, channel, exists, center, scale,
            offset, K, S, WRITES, 1, E, PLANES, MASKED, RESIDUAL, FROM_Y, ACT, ACC,
        )  # fmt: skip
        gradients, centereds, products = gradients + gradient, centereds + centered, products + product
    one, two, three = tl.sum(gradients, 0), tl.sum(centereds, 0), tl.sum(products, 0)
    slots, slot = tl.num_programs(1) * spans, split
    if PLANES:
        slot = split * spans + block - channel * S // W
        position = column - channel * S
        begins = ((position == 0) | (column == block * W)).to(tl.int32)
        _begins, one = tl.associative_scan((begins, one), 0, add_segments)
        _begins, two = tl.associative_scan((begins, two), 0, add_segments)
        _begins, three = tl.associative_scan((begins, three), 0, add_segments)
        exists = exists & ((position == S - 1) | (column == block * W + W - 1))
    at, row = (g * C + channel) * slots + slot, tl.cast(G, tl.int64) * C * slots
    tl.store(summed + at, one, mask=exists)
    tl.store(summed + row + at, two, mask=exists)
    tl.store(summed + 2 * row + at, three, mask=exists)


@triton.jit
def _store_difference(
    dy, x, mask, residual, y, dx, dresidual, first, rows, column, channel, exists, center, scale, offset, one, two,
    three, K, S, CHUNK: tl.constexpr, E: tl.constexpr, PLANES: tl.constexpr, MASKED: tl.constexpr,
    WRITTEN: tl.constexpr, RESIDUAL: tl.constexpr, FROM_Y: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of x for a chunk of tiles."""
    if WRITTEN:  # the gradient before the activation lies in dresidual, masked
        gradient, centered, offsets, there, counted = _load_gradient(
            dresidual, x, mask, residual, y, first, rows, column, channel, exists, center, scale, offset, K, S,
            CHUNK, E, PLANES, MASKED, False, False, 0, ACC,
        )  # fmt: skip
    else:
        gradient, centered, offsets, there, counted = _load_gradient(
            dy, x, mask, residual, y, first, rows, column, channel, exists, center, scale, offset, K, S,
            CHUNK, E, PLANES, MASKED, RESIDUAL, FROM_Y, ACT, ACC,
        )  # fmt: skip
    value = gradient * one[None, None, :] + (centered * two[None, None, :] + three[None, None, :])
    if MASKED:
        value = tl.where(counted, value, 0.0)
    tl.store(dx + offsets, value.to(dx.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["units", "N", "S", "per_group", "G", "blocks", "share"])
def differentiate(
    dy, x, mask, residual, y, coefficients, slopes, dx, dresidual, gradients, total,
    units, N, S, per_group, G, blocks, share,
    WRITTEN: tl.constexpr, ADDS: tl.constexpr, RESIDUAL: tl.constexpr, FROM_Y: tl.constexpr, ACT: tl.constexpr,
    CHUNK: tl.constexpr, DIVISOR: tl.constexpr, PLANES: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    MASKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of x; and the first programs add up those of weight and bias over the groups."""
    K = units * DIVISOR
    split = tl.program_id(1)
    block, g = block_and_group(blocks)
    _above, first, rows = rows_of(g, split, N, S, per_group, G, share, PLANES)
    column, channel, exists = columns_of(block, K, S, PLANES, W)
    C = K // S if PLANES else K
    at, row = g * C + channel, tl.cast(G, tl.int64) * C
    center = _load_row(coefficients, 0, at, exists)
    scale, offset = center, center
    if ACT != 0 and not FROM_Y and not WRITTEN:
        scale, offset = _load_row(coefficients, row, at, exists), _load_row(coefficients, 2 * row, at, exists)
    one, two = _load_row(slopes, 0, at, exists), _load_row(slopes, row, at, exists)
    three = _load_row(slopes, 2 * row, at, exists)
    full = rows // (CHUNK * E)
    for start in range(full * CHUNK * E, rows, E):
        _store_difference(
            dy, x, mask, residual, y, dx, dresidual, first + start, rows - start, column, channel, exists, center,
            scale, offset, one, two, three, K, S, 1, E, PLANES, MASKED, WRITTEN, RESIDUAL, FROM_Y, ACT, ACC,
        )  # fmt: skip
    for i in range(0, full):
        start = (full - 1 - i) * CHUNK * E
        _store_difference(
            dy, x, mask, residual, y, dx, dresidual, first + start, CHUNK * E, column, channel, exists, center,
            scale, offset, one, two, three, K, S, CHUNK, E, PLANES, MASKED, WRITTEN, RESIDUAL, FROM_Y, ACT, ACC,
        )  # fmt: skip
    if ADDS:
        _add_groups(gradients, total, G, 2 * C, split * tl.num_programs(0) + tl.program_id(0),
                    tl.num_programs(0) * tl.num_programs(1), ACC)  # fmt: skip


@triton.jit
def _add_groups(gradients, total, G, numbers, program, programs, ACC: tl.constexpr):
    """Sums of (2, G, C) over the groups; `numbers` is 2 * C."""
    BC: tl.constexpr = 64
    GB: tl.constexpr = 16
    C = numbers // 2
    programs = tl.minimum(programs, tl.cdiv(numbers, BC))
    for first in range(tl.minimum(program, programs) * BC, numbers, programs * BC):
        i = first + tl.arange(0, BC)
        found = tl.zeros((BC,), ACC)
        for start in range(0, G, GB):
            g = start + tl.arange(0, GB)
            at = ((i // C)[None, :].to(tl.int64) * G + g[:, None]) * C + (i % C)[None, :]
            found += tl.sum(tl.load(gradients + at, mask=(g < G)[:, None] & (i < numbers)[None, :], other=0.0), 0)
        tl.store(total + i, found, mask=i < numbers)


@triton.jit(do_not_specialize=["N", "C", "S", "per_group", "G"])
def differentiate_whole(
    dy, x, mask, residual, y, coefficients, count, weight, dx, dresidual, gradients, N, C, S, per_group, G,
    WEIGHT: tl.constexpr, WRITES: tl.constexpr, RESIDUAL: tl.constexpr, FROM_Y: tl.constexpr, ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, E: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Both passes by a program that holds a channel's elements in a group."""
    block, g = block_and_group(tl.cdiv(C, BC))
    begin, examples = group_bounds(g, N, per_group, G)
    c = block * BC + tl.arange(0, BC)
    at, row = g * C + c, tl.cast(G, tl.int64) * C
    center = _load_row(coefficients, 0, at, c < C)[None, :]
    scale = _load_row(coefficients, row, at, c < C)[None, :]
    offset = _load_row(coefficients, 2 * row, at, c < C)[None, :]
    offsets, at_mask, exists = whole_tile(begin, examples, c, C, S, CHANNELS_LAST, E, RUN)
    counted = exists
    if MASKED:
        counted = exists & (tl.load(mask + at_mask, mask=exists, other=0) != 0)
    gradient = tl.load(dy + offsets, mask=exists, other=0.0).to(ACC)
    centered = tl.load(x + offsets, mask=exists, other=0.0).to(ACC) - center
    gradient = _gradient(gradient, centered, residual, y, offsets, exists, scale, offset, RESIDUAL, FROM_Y, ACT, ACC)
    gradient, centered = tl.where(counted, gradient, 0.0), tl.where(counted, centered, 0.0)
    if WRITES:
        gradient = _written(dresidual, offsets, gradient, exists, ACC)
    one, two, three, dweight, dbias = slopes_of(
        tl.sum(gradient, 0), tl.sum(centered, 0), tl.sum(gradient * centered, 0), tl.load(count + g), coefficients, at,
        row, c < C, weight, c, WEIGHT,
    )  # fmt: skip
    tl.store(gradients + at, dweight, mask=c < C)
    tl.store(gradients + row + at, dbias, mask=c < C)
    value = gradient * one[None, :] + (centered * two[None, :] + three[None, :])
    tl.store(dx + offsets, tl.where(counted, value, 0.0).to(dx.dtype.element_ty), mask=exists)
