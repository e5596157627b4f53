"""The path over torch's GPU kernels: its arithmetic here with stand-ins for these, itself where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from renorm.grouping import Grouping
from renorm.ops import aten, reference
from renorm.ops.problem import Correction, Inputs, Settings, Target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dims_of(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def spread(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (x.ndim - 2))


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, dims_of(x), correction=0)
    return mean, (var + eps).rsqrt()


def elemt(x: Tensor, weight: Any, bias: Any, mean: Tensor, inverse_sigma: Tensor, eps: float) -> Tensor:
    y = (x - spread(mean, x)) * spread(inverse_sigma, x)
    y = y if weight is None else y * spread(weight, x)
    return y if bias is None else y + spread(bias, x)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, inverse_sigma: Tensor, weight: Any, *wanted: bool
) -> tuple[Tensor, ...]:
    sum_dy, sum_dy_centered = dy.sum(dims_of(x)), (dy * (x - spread(mean, x))).sum(dims_of(x))
    return sum_dy, sum_dy_centered, sum_dy_centered * inverse_sigma, sum_dy


def backward_elemt(
    dy: Tensor, x: Tensor, mean: Tensor, inverse_sigma: Tensor, weight: Any, sum_dy: Tensor, sum_dy_centered: Tensor,
    count: Tensor,
) -> Tensor:  # fmt: skip
    slope = spread(sum_dy_centered * inverse_sigma.square(), x) / count.sum()
    dx = (dy - spread(sum_dy, x) / count.sum() - (x - spread(mean, x)) * slope) * spread(inverse_sigma, x)
    return dx if weight is None else dx * spread(weight, x)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(torch, "batch_norm_stats", stats)
    monkeypatch.setattr(torch, "batch_norm_elemt", elemt)
    monkeypatch.setattr(torch, "batch_norm_backward_reduce", backward_reduce)
    monkeypatch.setattr(torch, "batch_norm_backward_elemt", backward_elemt)


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", ["batch", "renorm", "given"])
def test_forward_and_backward_are_the_reference_s(kind: str, affine: tuple[bool, bool]) -> None:
    with torch.device(DEVICE):
        x, dy = (torch.randn(6, 4, 5, 3, dtype=torch.float64) for _ in range(2))
        weight, bias = (torch.randn(4, dtype=torch.float64) if wanted else None for wanted in affine)
        correction = {
            "batch": None,
            "renorm": Target(torch.randn(4).double(), torch.rand(4).double() + 0.5, 1.2, 0.3),
            "given": Correction(torch.rand(1, 4).double(), torch.rand(1, 4).double()),
        }[kind]
    with torch.no_grad():
        inputs, settings = Inputs(x, weight, bias), Settings(Grouping(), 1e-5)
        ours = aten.GPU.forward(inputs, settings, correction)
        exact = reference.forward(inputs, settings, correction)
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
        gradients = aten.GPU.backward(dy, inputs, settings, ours.moments, ours.correction)
        right = reference.backward(dy, inputs, settings, exact.moments, exact.correction)
        torch.testing.assert_close(gradients, right, rtol=1e-9, atol=1e-9)
