"""Devices without kernels of their own take plain torch: here meta tensors, which have shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import renorm


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 5), (6, 8, 4, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"examples_per_group": 2}, {"channels_per_group": 4}, {"act": "silu"}])
@pytest.mark.parametrize("limits", [None, renorm.Limits(), renorm.Limits.constant()])
@pytest.mark.parametrize("masked", [False, True])
def test_training_and_evaluation_on_meta(
    shape: tuple[int, ...], options: dict[str, Any], limits: Any, masked: bool
) -> None:
    layer = renorm.Norm(8, limits=limits, device="meta", **options)
    x = torch.empty(shape, device="meta", requires_grad=True)
    mask = torch.empty(shape[:1] + shape[2:], dtype=torch.bool, device="meta") if masked else None
    y = layer(x, mask=mask)
    y.sum().backward()
    assert y.shape == x.shape
    assert y.is_meta
    assert x.grad is not None
    assert x.grad.shape == x.shape
    layer.eval()
    layer.example_weight = 0.1
    assert layer(x).shape == x.shape
