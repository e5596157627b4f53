"""Activations and their derivatives, for the kernels."""

from __future__ import annotations

import triton
import triton.language as tl

# How the kernels know an activation.
CODES = {None: 0, "relu": 1, "relu6": 2, "leaky_relu": 3, "silu": 4, "gelu": 5, "hardswish": 6}


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), without infinity on the way."""
    return 1 / (1 + tl.exp(tl.where(z < -80, 80.0, -z)))


@triton.jit
def activate(z, ACT: tl.constexpr):
    """What torch's function of the same name returns; NaN stays NaN, as comparisons with it are false."""
    if ACT == 1:
        z = tl.where(z <= 0, 0.0, z)
    elif ACT == 2:
        z = tl.where(z <= 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACT == 3:
        z = tl.where(z <= 0, z * 0.01, z)
    elif ACT == 4:
        z = z * sigmoid(z)
    elif ACT == 5:
        z = z * 0.5 * (1 + tl.erf(z * 0.70710678118654752440))
    elif ACT == 6:
        z = tl.where(z <= -3, 0.0, tl.where(z >= 3, z, z * (z + 3) * 0.16666666666666666))
    return z


@triton.jit
def backpropagate(dy, z, ACT: tl.constexpr):
    """The gradient before the activation; z is what went in, or, for the piecewise linear ones, what came out."""
    if ACT == 1:
        dy = tl.where(z <= 0, 0.0, dy)
    elif ACT == 2:
        dy = tl.where((z <= 0) | (z >= 6), 0.0, dy)
    elif ACT == 3:
        dy = tl.where(z <= 0, dy * 0.01, dy)
    elif ACT == 4:
        s = sigmoid(z)
        dy = dy * s * (1 + z * (1 - s))
    elif ACT == 5:
        cumulative = 0.5 * (1 + tl.erf(z * 0.70710678118654752440))
        dy = dy * (cumulative + z * 0.39894228040143267794 * tl.exp(-0.5 * z * z))
    elif ACT == 6:
        dy = tl.where(z <= -3, 0.0, tl.where(z >= 3, dy, dy * (z * 0.33333333333333333 + 0.5)))
    return dy
