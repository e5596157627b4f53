"""Between the two passes over the data: from what programs measured to what every channel is normalized by.

A program settles a few channels of a group, or, where channels share statistics, one group of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .moments import affine, coefficients_of, keep_coefficients, limits_now, moments_of_slots, normalizer, sums_of_slots
from .tiles import block_and_group
from .tracking import keep_facts

CHANNELS, SLOTS = 4, 128  # of channels by themselves
SHARING_CHANNELS, SHARING_SLOTS = 16, 16  # of channels that share statistics, at a time
WARPS = 4


@triton.jit(do_not_specialize=["C", "S", "G", "slots", "spans"])
def settle(
    measured, mean, var, count, coefficients, facts, weight, bias, running_mean, running_var, steps, r_given, d_given,
    r_max: tl.float64, d_max: tl.float64, start: tl.float64, r_end: tl.float64, d_end: tl.float64, alpha: tl.float64,
    momentum: tl.float64, C, S, G, slots, spans,
    EPS: tl.constexpr, SOURCE: tl.constexpr, LIMITS: tl.constexpr, CUMULATIVE: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, KEEPS: tl.constexpr, PLANES: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
    SLOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block, g = block_and_group(tl.cdiv(C, BC))
    c = block * BC + tl.arange(0, BC)
    shift, rest = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)
    variance, counts = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)
    if SOURCE != 4:
        shift, rest, variance, counts = moments_of_slots(
            measured, g, c, C, S, G, slots, spans, PLANES, W, BC, SLOTS, ACC
        )
    at = g * C + c
    high_r, high_d = tl.full((), 1.0, ACC), tl.full((), 0.0, ACC)
    if SOURCE == 1:
        high_r, high_d = limits_now(steps, r_given, d_given, r_max, d_max, start, r_end, d_end, LIMITS, ACC)
    center, scale, offset, r, d, inverse_sigma = coefficients_of(
        shift, rest, variance, counts, c, C, at, weight, bias, running_mean, running_var, r_given, d_given,
        high_r, high_d, alpha, EPS, SOURCE, WEIGHT, BIAS,
    )  # fmt: skip
    keep_coefficients(coefficients, at, tl.cast(G, tl.int64) * C, c < C, center, scale, offset, r, d, inverse_sigma)
    if KEEPS:
        tl.store(mean + at, shift + rest, mask=c < C)
        tl.store(var + at, variance, mask=c < C)
        tl.store(count + g + c, counts, mask=c == 0)
        keep_facts(facts, shift + rest + variance, c < C, steps, momentum, CUMULATIVE, ACC)


@triton.jit
def _merge_running(running_mean, running_var, first, k, ACC: tl.constexpr, BC: tl.constexpr):
    """Law of total variance over the channels [first, first + k)."""
    mean, var = tl.zeros((), ACC), tl.zeros((), ACC)
    for i in range(0, k, BC):
        c, own = first + i + tl.arange(0, BC), i + tl.arange(0, BC) < k
        mean += tl.sum(tl.load(running_mean + c, mask=own, other=0.0).to(ACC), 0) / k
    for i in range(0, k, BC):
        c, own = first + i + tl.arange(0, BC), i + tl.arange(0, BC) < k
        apart = tl.load(running_mean + c, mask=own, other=0.0).to(ACC) - mean
        each = tl.load(running_var + c, mask=own, other=0.0).to(ACC) + apart * apart
        var += tl.sum(tl.where(own, each, 0.0), 0) / k
    return mean, var


@triton.jit(do_not_specialize=["C", "S", "G", "slots", "spans", "k"])
def settle_sharing(
    measured, mean, var, count, coefficients, facts, weight, bias, running_mean, running_var, steps, r_given, d_given,
    r_max: tl.float64, d_max: tl.float64, start: tl.float64, r_end: tl.float64, d_end: tl.float64, alpha: tl.float64,
    momentum: tl.float64, C, S, G, slots, spans, k,
    EPS: tl.constexpr, SOURCE: tl.constexpr, LIMITS: tl.constexpr, CUMULATIVE: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, KEEPS: tl.constexpr, PLANES: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
    SLOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    j, g = block_and_group(C // k)
    first = j * k
    near, merged, variance = tl.zeros((), ACC), tl.zeros((), ACC), tl.zeros((), ACC)
    counted, sums = tl.zeros((), ACC), tl.zeros((BC,), ACC)
    if SOURCE != 4:
        for i in range(0, k, BC):
            own = i + tl.arange(0, BC) < k
            c = tl.minimum(first + i + tl.arange(0, BC), first + k - 1)
            shift, rest, _, counts = moments_of_slots(measured, g, c, C, S, G, slots, spans, PLANES, W, BC, SLOTS, ACC)
            if i == 0:
                near = tl.sum(tl.where((c == first) & own, shift, 0.0), 0)
                counted = tl.max(counts, 0)
            merged += tl.sum(tl.where(own, (shift - near) + rest, 0.0), 0) / k
        for i in range(0, k, BC):
            own = i + tl.arange(0, BC) < k
            c = tl.minimum(first + i + tl.arange(0, BC), first + k - 1)
            shift, rest, each, _ = moments_of_slots(measured, g, c, C, S, G, slots, spans, PLANES, W, BC, SLOTS, ACC)
            apart = ((shift - near) + rest) - merged
            variance += tl.sum(tl.where(own, each + apart * apart, 0.0), 0) / k
            if KEEPS:
                tl.store(mean + g * C + c, shift + rest, mask=own)
                tl.store(var + g * C + c, each, mask=own)
                sums += tl.where(own, shift + rest + each, 0.0)
    known_mean, known_var = near, variance
    if SOURCE == 1 or SOURCE == 3 or SOURCE == 4:
        known_mean, known_var = _merge_running(running_mean, running_var, first, k, ACC, BC)
    high_r, high_d = tl.full((), 1.0, ACC), tl.full((), 0.0, ACC)
    if SOURCE == 1:
        high_r, high_d = limits_now(steps, r_given, d_given, r_max, d_max, start, r_end, d_end, LIMITS, ACC)
    r, d = tl.full((), 1.0, ACC), tl.zeros((), ACC)
    if SOURCE == 2:
        r = tl.load(r_given + g * (C // k) + j).to(ACC)
        d = tl.load(d_given + g * (C // k) + j).to(ACC)
    center, rest, r, d, inverse_sigma = normalizer(
        near, merged, variance, counted, known_mean, known_var, r, d, high_r, high_d, alpha, EPS, SOURCE
    )
    for i in range(0, k, BC):
        c, own = first + i + tl.arange(0, BC), i + tl.arange(0, BC) < k
        ones = tl.full((BC,), 1.0, ACC)
        scale, offset = affine(rest * ones, r, d, inverse_sigma, weight, bias, c, own, WEIGHT, BIAS)
        keep_coefficients(
            coefficients, g * C + c, tl.cast(G, tl.int64) * C, own, center * ones, scale, offset, r * ones, d * ones,
            inverse_sigma * ones,
        )  # fmt: skip
    if KEEPS:
        if j == 0:
            tl.store(count + g, counted)
        keep_facts(facts, sums, tl.arange(0, BC) < k, steps, momentum, CUMULATIVE, ACC)


@triton.jit
def slopes_of(gradient, centered, product, total, coefficients, at, row, exists, weight, c, WEIGHT: tl.constexpr):
    """dx = g * first + (x - center) * second + third; and the gradients of weight and bias."""
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


@triton.jit(do_not_specialize=["C", "S", "G", "slots", "spans"])
def settle_backward(
    summed, count, coefficients, weight, slopes, gradients, C, S, G, slots, spans,
    WEIGHT: tl.constexpr, PLANES: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, SLOTS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    block, g = block_and_group(tl.cdiv(C, BC))
    c = block * BC + tl.arange(0, BC)
    gradient, centered, product = sums_of_slots(summed, g, c, C, S, G, slots, spans, PLANES, W, BC, SLOTS, ACC)
    at, row = g * C + c, tl.cast(G, tl.int64) * C
    first, second, third, dweight, dbias = slopes_of(
        gradient, centered, product, tl.load(count + g), coefficients, at, row, c < C, weight, c, WEIGHT
    )
    tl.store(slopes + at, first, mask=c < C)
    tl.store(slopes + row + at, second, mask=c < C)
    tl.store(slopes + 2 * row + at, third, mask=c < C)
    tl.store(gradients + at, dweight, mask=c < C)
    tl.store(gradients + row + at, dbias, mask=c < C)


@triton.jit(do_not_specialize=["C", "S", "G", "slots", "spans", "k"])
def settle_sharing_backward(
    summed, count, coefficients, weight, slopes, gradients, C, S, G, slots, spans, k,
    WEIGHT: tl.constexpr, PLANES: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, SLOTS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    j, g = block_and_group(C // k)
    first, row = j * k, tl.cast(G, tl.int64) * C
    total = tl.load(count + g) * k
    share = 1 / tl.maximum(total, 1.0)
    r = tl.load(coefficients + 3 * row + g * C + first)
    d = tl.load(coefficients + 4 * row + g * C + first)
    inverse_sigma = tl.load(coefficients + 5 * row + g * C + first)
    rest = tl.zeros((), ACC)
    for i in range(0, k, BC):
        own = i + tl.arange(0, BC) < k
        c = tl.minimum(first + i + tl.arange(0, BC), first + k - 1)
        _, centered, _ = sums_of_slots(summed, g, c, C, S, G, slots, spans, PLANES, W, BC, SLOTS, ACC)
        rest += tl.sum(tl.where(own, centered, 0.0), 0) * share
    mean_g, mean_gz = tl.zeros((), ACC), tl.zeros((), ACC)
    for i in range(0, k, BC):
        own = i + tl.arange(0, BC) < k
        c = tl.minimum(first + i + tl.arange(0, BC), first + k - 1)
        gradient, _, product = sums_of_slots(summed, g, c, C, S, G, slots, spans, PLANES, W, BC, SLOTS, ACC)
        dot = product - rest * gradient
        tl.store(gradients + g * C + c, dot * inverse_sigma * r + gradient * d, mask=own)
        tl.store(gradients + row + g * C + c, gradient, mask=own)
        if WEIGHT:
            gamma = tl.load(weight + c).to(ACC)
            gradient, dot = gradient * gamma, dot * gamma
        mean_g += tl.sum(tl.where(own, gradient, 0.0), 0) * share
        mean_gz += tl.sum(tl.where(own, dot, 0.0), 0) * inverse_sigma * share
    scale = tl.where(total > 1, inverse_sigma * r, 0.0)
    slope = -scale * inverse_sigma * mean_gz
    constant = -scale * mean_g - slope * rest
    for i in range(0, k, BC):
        c, own = first + i + tl.arange(0, BC), i + tl.arange(0, BC) < k
        gradient = tl.full((BC,), 1.0, ACC) * scale
        if WEIGHT:
            gradient = gradient * tl.load(weight + c, mask=own, other=1.0).to(ACC)
        at = slopes + g * C + c
        tl.store(at, gradient, mask=own)
        tl.store(at + row, tl.full((BC,), 1.0, ACC) * slope, mask=own)
        tl.store(at + 2 * row, tl.full((BC,), 1.0, ACC) * constant, mask=own)
