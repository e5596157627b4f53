"""Gradients of normalization on a GPU: one kernel where a program can hold a channel of a group, else two."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import backpropagate
from .settle import sums_of_splits
from .tiles import block_and_group, group_bounds, tile_at


@triton.jit
def _gradient(dy, x, mask, residual, y, offsets, at_mask, exists, center, scale, offset, RESIDUAL: tl.constexpr,
              FROM_Y: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """A tile's gradient before the activation, its x - center, both 0 where nothing counts, and what counts."""
    counted = exists
    if MASKED:
        counted = exists & (tl.load(mask + at_mask, mask=exists, other=0) != 0)
    gradient = tl.load(dy + offsets, mask=exists, other=0.0).to(ACC)
    centered = tl.load(x + offsets, mask=exists, other=0.0).to(ACC) - center[None, :]
    if ACT != 0:
        if FROM_Y:
            z = tl.load(y + offsets, mask=exists, other=0.0).to(ACC)
        else:
            z = centered * scale[None, :] + offset[None, :]
            if RESIDUAL:
                z += tl.load(residual + offsets, mask=exists, other=0.0).to(ACC)
        gradient = backpropagate(gradient, z, ACT)
    return tl.where(counted, gradient, 0.0), tl.where(counted, centered, 0.0), counted


@triton.jit
def _load_coefficients(coefficients, at, row, exists):
    center = tl.load(coefficients + at, mask=exists, other=0.0)
    scale = tl.load(coefficients + row + at, mask=exists, other=0.0)
    return center, scale, tl.load(coefficients + 2 * row + at, mask=exists, other=0.0)


@triton.jit
def sum_gradients(
    dy, x, mask, residual, y, coefficients, measured, N, C, S, per_group, G, tiles, splits,
    RESIDUAL: tl.constexpr, FROM_Y: tl.constexpr, ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, E: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sums over the tiles of a program: of g, of x - center, of their product; (3, G, splits, C)."""
    split = tl.program_id(1)
    block, g = block_and_group(C, BC)
    begin, examples = group_bounds(g, N, per_group, G)
    c = block * BC + tl.arange(0, BC)
    center, scale, offset = _load_coefficients(coefficients, g * C + c, G * C, c < C)
    share = tl.cdiv(tiles, splits)
    first = split * share
    gradients = tl.zeros((E, BC), ACC)
    centereds = tl.zeros((E, BC), ACC)
    products = tl.zeros((E, BC), ACC)
    for t in range(first, tl.minimum(first + share, tiles)):
        offsets, at_mask, exists = tile_at(t, begin, examples, c, C, S, CHANNELS_LAST, E, RUN)
        gradient, centered, _ = _gradient(
            dy,
            x,
            mask,
            residual,
            y,
            offsets,
            at_mask,
            exists,
            center,
            scale,
            offset,
            RESIDUAL,
            FROM_Y,
            ACT,
            MASKED,
            ACC,
        )
        gradients += gradient
        centereds += centered
        products += gradient * centered
    at, row = measured + (g * splits + split) * C + c, G * splits * C
    tl.store(at, tl.sum(gradients, 0), mask=c < C)
    tl.store(at + row, tl.sum(centereds, 0), mask=c < C)
    tl.store(at + 2 * row, tl.sum(products, 0), mask=c < C)


@triton.jit
def _slopes_of(gradient, centered, product, count, coefficients, at, row, exists, weight, c, WEIGHT: tl.constexpr):
    """dx = g * first + (x - center) * second + third; and the gradients of weight and bias."""
    total = tl.load(count)
    share = 1 / tl.maximum(total, 1.0)
    r = tl.load(coefficients + 3 * row + at, mask=exists, other=0.0)
    d = tl.load(coefficients + 4 * row + at, mask=exists, other=0.0)
    inverse_sigma = tl.load(coefficients + 5 * row + at, mask=exists, other=0.0)
    rest = centered * share
    dot = product - rest * gradient
    dweight, dbias = dot * inverse_sigma * r + gradient * d, gradient
    # Through a single element no gradient flows, not even rounding.
    scale = tl.where(total > 1, inverse_sigma * r, 0.0)
    if WEIGHT:
        scale = scale * tl.load(weight + c, mask=exists, other=0.0).to(scale.dtype)
    slope = -scale * inverse_sigma * inverse_sigma * dot * share
    return scale, slope, -scale * gradient * share - slope * rest, dweight, dbias


@triton.jit
def _store_gradients(dx, dresidual, offsets, exists, counted, gradient, centered, first, second, third,
                     WANTS_RESIDUAL: tl.constexpr):  # fmt: skip
    value = gradient * first[None, :] + centered * second[None, :] + third[None, :]
    tl.store(dx + offsets, tl.where(counted, value, 0.0).to(dx.dtype.element_ty), mask=exists)
    if WANTS_RESIDUAL:
        tl.store(dresidual + offsets, gradient.to(dresidual.dtype.element_ty), mask=exists)


@triton.jit
def differentiate(
    dy, x, mask, residual, y, coefficients, measured, count, weight, slopes, dx, dresidual, gradients,
    N, C, S, per_group, G, tiles, splits, programs,
    WEIGHT: tl.constexpr, SETTLED: tl.constexpr, SPLITS: tl.constexpr, WANTS_RESIDUAL: tl.constexpr,
    RESIDUAL: tl.constexpr, FROM_Y: tl.constexpr, ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, E: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of x and residual, from the sums; and, by the first program of a channel, of weight and bias."""
    program = tl.program_id(1)
    block, g = block_and_group(C, BC)
    c = block * BC + tl.arange(0, BC)
    at, row = g * C + c, G * C
    center, scale, offset = _load_coefficients(coefficients, at, row, c < C)
    if SETTLED:
        first, second, third = _load_coefficients(slopes, at, row, c < C)
    else:
        gradient_sum, centered_sum, product_sum = sums_of_splits(measured, g, c, C, G, splits, SPLITS)
        first, second, third, dweight, dbias = _slopes_of(
            gradient_sum, centered_sum, product_sum, count + g, coefficients, at, row, c < C, weight, c, WEIGHT
        )
        if program == 0:
            tl.store(gradients + at, dweight, mask=c < C)
            tl.store(gradients + row + at, dbias, mask=c < C)
    begin, examples = group_bounds(g, N, per_group, G)
    share = tl.cdiv(tiles, programs)
    last = tl.minimum((program + 1) * share, tiles) - 1
    for i in range(0, last + 1 - program * share):
        # The last tile first: it is the likeliest to be in the cache.
        offsets, at_mask, exists = tile_at(last - i, begin, examples, c, C, S, CHANNELS_LAST, E, RUN)
        gradient, centered, counted = _gradient(
            dy,
            x,
            mask,
            residual,
            y,
            offsets,
            at_mask,
            exists,
            center,
            scale,
            offset,
            RESIDUAL,
            FROM_Y,
            ACT,
            MASKED,
            ACC,
        )
        _store_gradients(
            dx, dresidual, offsets, exists, counted, gradient, centered, first, second, third, WANTS_RESIDUAL
        )


@triton.jit
def differentiate_whole(
    dy, x, mask, residual, y, coefficients, count, weight, dx, dresidual, gradients, N, C, S, per_group, G,
    WEIGHT: tl.constexpr, WANTS_RESIDUAL: tl.constexpr, RESIDUAL: tl.constexpr, FROM_Y: tl.constexpr, ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, E: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Both passes by a program that holds a channel's elements in a group."""
    block, g = block_and_group(C, BC)
    begin, examples = group_bounds(g, N, per_group, G)
    c = block * BC + tl.arange(0, BC)
    at, row = g * C + c, G * C
    center, scale, offset = _load_coefficients(coefficients, at, row, c < C)
    offsets, at_mask, exists = tile_at(0, begin, examples, c, C, S, CHANNELS_LAST, E, RUN)
    gradient, centered, counted = _gradient(
        dy, x, mask, residual, y, offsets, at_mask, exists, center, scale, offset, RESIDUAL, FROM_Y, ACT, MASKED, ACC
    )
    first, second, third, dweight, dbias = _slopes_of(
        tl.sum(gradient, 0), tl.sum(centered, 0), tl.sum(gradient * centered, 0), count + g, coefficients, at, row,
        c < C, weight, c, WEIGHT,
    )  # fmt: skip
    tl.store(gradients + at, dweight, mask=c < C)
    tl.store(gradients + row + at, dbias, mask=c < C)
    _store_gradients(dx, dresidual, offsets, exists, counted, gradient, centered, first, second, third, WANTS_RESIDUAL)
