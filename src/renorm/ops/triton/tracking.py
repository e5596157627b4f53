"""How the running statistics move, on a GPU: the rules of ops.tracking in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from ...moments import Moments
from ..problem import RunningState, Settings
from ..tracking import RULES, Rule

_BLOCK = 512
_CODES = {name: code for code, name in enumerate(RULES)}  # std 0, var 1, total 2


def move(state: RunningState, moments: Moments, rule: Rule, settings: Settings) -> None:
    """Move a layer's buffers by one batch, see `dispatch.track`."""
    groups, channels = moments.mean.shape
    _move[1,](
        *state, *moments, groups, channels, settings.grouping.channels_per_group, rule.momentum or 0.0, settings.eps,
        RULE=_CODES[rule.tracking], CUMULATIVE=rule.momentum is None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(channels)), num_warps=4,
    )  # fmt: skip


@triton.jit
def _move(
    running_mean, running_var, steps, skipped, mean, var, count, G, C, k, momentum, eps,
    RULE: tl.constexpr, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    faults = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, G * C, BLOCK):
        own = i + lanes < G * C
        sums = tl.load(mean + i + lanes, mask=own, other=0.0) + tl.load(var + i + lanes, mask=own, other=0.0)
        faults += tl.where(sums * 0 == 0, 0, 1)  # 0 times anything else is not a number
    finite = tl.max(faults, 0) == 0
    total, largest = tl.load(count) * 0, tl.load(count) * 0
    for g in range(0, G):
        total += tl.load(count + g)
        largest = tl.maximum(largest, tl.load(count + g))
    accepted = finite & (largest > 0)
    taken = tl.load(steps)
    if CUMULATIVE:
        momentum = 1 / (taken + 1).to(total.dtype)
    has_spread = (largest * k > 1) & (total > 1)
    for i in range(0, C, BLOCK):
        c, own = i + lanes, i + lanes < C
        old_mean = tl.load(running_mean + c, mask=own, other=0.0)
        old_var = tl.load(running_var + c, mask=own, other=0.0)
        batch_mean, batch_var = old_mean * 0, old_mean * 0
        for g in range(0, G):
            share = tl.load(count + g) / tl.maximum(total, 1.0)
            batch_mean += share * tl.load(mean + g * C + c, mask=own, other=0.0)
        sigma = old_mean * 0
        for g in range(0, G):
            share = tl.load(count + g) / tl.maximum(total, 1.0)
            apart = tl.load(mean + g * C + c, mask=own, other=0.0) - batch_mean
            variance = tl.load(var + g * C + c, mask=own, other=0.0)
            batch_var += share * (variance + apart * apart)
            sigma += share * tl.sqrt(variance + eps)
        if RULE == 0:
            batch_var = old_mean * 0
            for g in range(0, G):
                share = tl.load(count + g) / tl.maximum(total, 1.0)
                variance = tl.load(var + g * C + c, mask=own, other=0.0)
                apart = tl.sqrt(variance + eps) - sigma
                batch_var += share * (variance - apart * apart)
            between = sigma - tl.sqrt(old_var + eps)
            new_var = old_var + momentum * (batch_var - old_var) - momentum * (1 - momentum) * between * between
        elif RULE == 1:
            unbiased = batch_var * total / tl.maximum(total - 1, 1.0)
            new_var = old_var + momentum * (unbiased - old_var)
        else:
            between = batch_mean - old_mean
            new_var = old_var + momentum * (batch_var - old_var) + momentum * (1 - momentum) * between * between
        if RULE != 2:
            new_var = tl.where(has_spread, new_var, old_var)
        new_mean = old_mean + momentum * (batch_mean - old_mean)
        tl.store(running_mean + c, tl.where(accepted, new_mean, old_mean), mask=own)
        tl.store(running_var + c, tl.where(accepted, new_var, old_var), mask=own)
    tl.store(steps, taken + tl.where(accepted, 1, 0))
    tl.store(skipped, tl.load(skipped) + tl.where(finite, 0, 1))
