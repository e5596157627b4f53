"""How the running statistics move, on a GPU: the rules of ops.tracking, by blocks of channels.

What all blocks need to know are the facts: first the momentum, then, of each program that made moments, how many were
not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tracking import RULES

CODES = {name: code for code, name in enumerate(RULES)}  # std 0, var 1, total 2
NONE = -1  # of the rules: the statistics stay
_CHANNELS = tl.constexpr(32)  # that a program moves at a time


def programs(channels: int) -> int:
    """How many have something to move."""
    return int(triton.cdiv(channels, _CHANNELS.value))


@triton.jit
def keep_facts(facts, sums, exists, steps, momentum, CUMULATIVE: tl.constexpr, ACC: tl.constexpr):
    """Write what a program knows; `sums` are finite where the moments are."""
    tl.store(facts + 1 + tl.program_id(0), tl.sum(tl.where(exists & (sums * 0 != 0), 1.0, 0.0), 0).to(ACC))
    if tl.program_id(0) == 0:
        weight = tl.full((), momentum, tl.float64)
        if CUMULATIVE:
            weight = 1 / (tl.load(steps) + 1).to(tl.float64)
        tl.store(facts, weight.to(ACC))


@triton.jit
def _is_finite(facts, number, BLOCK: tl.constexpr, ACC: tl.constexpr):
    faults = tl.zeros((BLOCK,), ACC)
    for i in range(0, number, BLOCK):
        faults += tl.load(facts + 1 + i + tl.arange(0, BLOCK), mask=i + tl.arange(0, BLOCK) < number, other=0.0)
    return tl.sum(faults, 0) == 0


@triton.jit
def _counts(count, G, GB: tl.constexpr, ACC: tl.constexpr):
    """Sum and largest of the groups' counts."""
    total, largest = tl.zeros((GB,), ACC), tl.zeros((GB,), ACC)
    for i in range(0, G, GB):
        each = tl.load(count + i + tl.arange(0, GB), mask=i + tl.arange(0, GB) < G, other=0.0)
        total += each
        largest = tl.maximum(largest, each)
    return tl.sum(total, 0), tl.max(largest, 0)


@triton.jit
def _moments_of_groups(mean, var, count, total, i, c, own, G, C, GB: tl.constexpr):
    """Share, mean and variance of some groups, (GB, 1) and (GB, channels)."""
    g = i + tl.arange(0, GB)
    there = (g < G)[:, None] & own[None, :]
    share = tl.load(count + g, mask=g < G, other=0.0)[:, None] / tl.maximum(total, 1.0)
    at = g[:, None].to(tl.int64) * C + c[None, :]
    return share, tl.load(mean + at, mask=there, other=0.0), tl.load(var + at, mask=there, other=0.0)


@triton.jit
def move_channels(
    running_mean, running_var, steps, skipped, mean, var, count, facts, G, C, k, program, programs, faults,
    EPS: tl.constexpr, RULE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Move the channels that fall to a program by one batch; the first counts it."""
    GB: tl.constexpr = 16
    BC: tl.constexpr = _CHANNELS
    programs = tl.minimum(programs, tl.cdiv(C, BC))
    if program < programs:
        finite = _is_finite(facts, faults, 256, ACC)
        total, largest = _counts(count, G, GB, ACC)
        accepted = finite & (largest > 0)
        has_spread = (largest * k > 1) & (total > 1)
        momentum = tl.load(facts)
        for first in range(program * BC, C, programs * BC):
            c = first + tl.arange(0, BC)
            own = c < C
            old_mean = tl.load(running_mean + c, mask=own, other=0.0)
            old_var = tl.load(running_var + c, mask=own, other=0.0)
            batch_mean, sigma = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)
            for i in range(0, G, GB):
                share, means, variances = _moments_of_groups(mean, var, count, total, i, c, own, G, C, GB)
                batch_mean += tl.sum(share * means, 0)
                sigma += tl.sum(share * tl.sqrt(variances + EPS), 0)
            batch_var = tl.zeros((BC,), ACC)
            for i in range(0, G, GB):
                share, means, variances = _moments_of_groups(mean, var, count, total, i, c, own, G, C, GB)
                if RULE == 0:
                    apart = tl.sqrt(variances + EPS) - sigma[None, :]
                    batch_var += tl.sum(share * (variances - apart * apart), 0)
                else:
                    apart = means - batch_mean[None, :]
                    batch_var += tl.sum(share * (variances + apart * apart), 0)
            new_var = old_var + momentum * (batch_var - old_var)
            if RULE == 0:
                between = sigma - tl.sqrt(old_var + EPS)
                new_var -= momentum * (1 - momentum) * between * between
            elif RULE == 1:
                new_var = old_var + momentum * (batch_var * total / tl.maximum(total - 1, 1.0) - old_var)
            else:
                between = batch_mean - old_mean
                new_var += momentum * (1 - momentum) * between * between
            if RULE != 2:
                new_var = tl.where(has_spread, new_var, old_var)
            new_mean = old_mean + momentum * (batch_mean - old_mean)
            tl.store(running_mean + c, tl.where(accepted, new_mean, old_mean), mask=own)
            tl.store(running_var + c, tl.where(accepted, new_var, old_var), mask=own)
        if program == 0:
            tl.store(steps, tl.load(steps) + tl.where(accepted, 1, 0))
            tl.store(skipped, tl.load(skipped) + tl.where(finite, 0, 1))


@triton.jit(do_not_specialize=["G", "C", "k", "faults"])
def move(
    running_mean, running_var, steps, skipped, mean, var, count, facts, G, C, k, faults,
    EPS: tl.constexpr, RULE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Move the running statistics by moments that are there."""
    move_channels(
        running_mean, running_var, steps, skipped, mean, var, count, facts, G, C, k, tl.program_id(0),
        tl.num_programs(0), faults, EPS, RULE, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["number"])
def examine(mean, var, steps, facts, momentum: tl.float64, number, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
            ACC: tl.constexpr):  # fmt: skip
    """The facts about moments that came from elsewhere, G * C of them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(mean + i, mask=i < number, other=0.0) + tl.load(var + i, mask=i < number, other=0.0)
    keep_facts(facts, sums, i < number, steps, momentum, CUMULATIVE, ACC)
