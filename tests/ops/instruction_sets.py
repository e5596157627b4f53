"""Compares the kernels of the instruction set named by RENORM_CPU with the definition; a process of its own, since
the set is chosen once."""

from __future__ import annotations

import itertools
import os

import torch

from renorm import functional
from renorm.ops import backends

torch.manual_seed(0)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
SHAPES = ((6, 5), (6, 10, 3, 3), (6, 4, 9, 13), (3, 300, 2), (2, 2, 5000))


SETS = ("baseline", "avx2", "avx512")


def main() -> None:
    assert backends.available["cpu"]
    # A machine may have less than what is asked for, never more.
    assert SETS.index(torch.ops.renorm.instruction_set()) <= SETS.index(os.environ["RENORM_CPU"])
    combinations = itertools.product(
        TOLERANCE, SHAPES, (False, True), (None, "relu", "gelu", "hardswish"), (False, True)
    )
    for dtype, shape, channels_last, act, masked in combinations:
        x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).to(dtype)
        if channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        mask = torch.rand(shape[0], *shape[2:]) < 0.7 if masked else None
        dy = torch.randn(shape, dtype=torch.float64).to(dtype)
        results = []
        for kernels, leaf in ((True, x.clone().requires_grad_()), (False, x.double().requires_grad_())):
            backends.available["cpu"] = kernels
            y, _ = functional.batch_norm(leaf, act=act, mask=mask, examples_per_group=3)
            results.append((y, *torch.autograd.grad(y, leaf, dy.to(y.dtype))))
        for actual, expected in zip(*results, strict=True):
            size = max(1.0, float(expected.detach().abs().max()))
            error = float((actual.detach().double() - expected.detach()).abs().max()) / size
            assert error <= TOLERANCE[dtype], (dtype, shape, channels_last, act, masked, error)


if __name__ == "__main__":
    main()
