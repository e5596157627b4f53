"""A backend in few lines, by the recipe of CONTRIBUTING: for the CPU, where the C++ kernels are turned off.

Run as a script it makes itself known, and says how far a layer that goes by it is from one that goes by torch.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import renorm
from renorm.activation import Activation
from renorm.grouping import Grouping
from renorm.moments import Moments
from renorm.ops import backends, composed, reference, schema, statistics, tracking
from renorm.ops.composed import finish
from renorm.ops.problem import Correction, Inputs, Running, RunningState, Settings, Target
from renorm.ops.schema import Coefficients, Saved
from renorm.ops.tracking import Rule

calls: list[str] = []


def normalize(
    inputs: Inputs, settings: Settings, correction: Target | Correction | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    calls.append("normalize")
    y, moments, applied = reference.forward(inputs, settings, correction)
    ones = torch.ones_like(moments.mean)
    r, d = (ones, 0 * ones) if applied is None else applied
    k = settings.grouping.channels_per_group
    # what its own backward needs stands where the kernels have scale and offset
    kept = moments.mean, moments.var + settings.eps
    rows = Coefficients(ones, *kept, statistics.spread(r, k), statistics.spread(d, k), ones)
    return finish(y, inputs, settings), *moments, torch.stack([row.expand_as(ones) for row in rows])


def normalize_backward(
    dy: Tensor, saved: Saved, grouping: Grouping, act: Activation | None, wants_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    calls.append("normalize_backward")
    rows, k = Coefficients(*saved.coefficients), grouping.channels_per_group
    correction = Correction(rows.r[:, ::k], rows.d[:, ::k])
    if act is not None:
        assert act == "relu"
        assert saved.y is not None
        dy = dy * (saved.y > 0)
    moments, settings = Moments(rows.scale, rows.offset, saved.count), Settings(grouping, eps=0.0)
    inputs = Inputs(saved.x, saved.weight, None, saved.mask)
    dx, dweight, dbias = reference.backward(dy, inputs, settings, moments, correction)
    return dx, dweight, dbias, dy if wants_residual else dy.new_empty(0)


def evaluate(inputs: Inputs, settings: Settings, running: Running, example_weight: float) -> Tensor:
    calls.append("evaluate")
    return composed.evaluate(inputs, settings, running, example_weight)


def track(state: RunningState, moments: Moments, rule: Rule, settings: Settings) -> None:
    calls.append("track")
    tracking.move(state, moments, rule, settings)


def results(grouped: bool) -> list[Tensor]:
    """Everything that a layer computes in a step, in one whose update waits, and at evaluation."""
    torch.manual_seed(0)
    x, residual = torch.randn(6, 4, 5, requires_grad=True), torch.randn(6, 4, 5, requires_grad=True)
    layer = renorm.BatchRenorm1d(
        4, limits=renorm.Limits.constant(1.5, 0.5), act="relu", examples_per_group=2 if grouped else None,
        channels_per_group=2 if grouped else 1,
    )  # fmt: skip
    y = layer(x, residual=residual)
    gradients = torch.autograd.grad(y, [x, residual, *layer.parameters()], torch.sin(y.detach()))
    with renorm.accumulate(layer):
        other = layer(x, residual=residual).detach()
    with torch.no_grad():
        return [y.detach(), *gradients, other, layer.eval()(x), *layer.buffers()]


def main() -> None:
    expected = [results(grouped) for grouped in (False, True)]
    schema.implement("cpu", "toy_backend")
    backends.KERNELS["cpu"] = backends.Kernels(lambda: True, "toy_backend")
    backends.available["cpu"] = True
    sys.modules["toy_backend"] = sys.modules["__main__"]
    for one, other in zip(expected, [results(grouped) for grouped in (False, True)], strict=True):
        torch.testing.assert_close(one, other)
    print(" ".join(sorted(set(calls))))


if __name__ == "__main__":
    main()
