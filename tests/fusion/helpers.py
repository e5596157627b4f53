"""What the tests of fusion share: conversion of copies, steps to compare, a block with a residual."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import renorm
from renorm import ConversionReport, convert

LIMITS = renorm.Limits.constant(r_max=1.5, d_max=0.5)
DOUBLE = {"dtype": torch.float64}


def converted(model: nn.Module, **options: Any) -> tuple[nn.Module, ConversionReport]:
    """A converted copy, and the report."""
    reports: list[ConversionReport] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing fused is what many tests are about
        model = convert(copy.deepcopy(model), renorm.BatchRenorm, limits=LIMITS, report=reports.append, **options)
    return model, reports[0]


def fused(model: nn.Module) -> nn.Module:
    return converted(model, fuse=True)[0]


def step(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """One training step without an optimizer: output, gradients of inputs and parameters, and buffers."""
    model.train().zero_grad()
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    torch.manual_seed(1)  # for dropout
    y = model(*(x * 1 for x in inputs))  # a leaf must not be changed in place
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = [x.grad for x in inputs] + [parameter.grad for parameter in model.parameters()]
    return [y.detach(), *(g for g in gradients if g is not None), *(b.clone() for b in model.buffers())]


def check_same(model: nn.Module, *inputs: Tensor, steps: int = 2) -> ConversionReport:
    """Compare the fused conversion with the unfused one: training steps, a training forward and evaluation."""
    (plain, _), (model, report) = converted(model), converted(model, fuse=True)
    for _ in range(steps):
        for expected, actual in zip(step(plain, inputs), step(model, inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for train in (True, False):
        outputs = []
        for either in (plain, model):
            torch.manual_seed(1)
            with torch.no_grad():
                outputs.append(either.train(train)(*(x.clone() for x in inputs)))
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    assert list(model.state_dict()) == list(plain.state_dict())
    return report


def rows(report: ConversionReport) -> list[tuple[str, bool, str | None]]:
    return [(row.name, row.adds, row.act) for row in report.fused]


def reasons(report: ConversionReport) -> dict[str, str]:
    return {row.name: row.reason for row in report.not_fused}


def batch(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 6, 5, 5)), **DOUBLE)


class Block(nn.Module):
    """Convolution and norm, and what `after` does with the layers, their output y, and the input x."""

    def __init__(self, after: Callable[[Any, Tensor, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, **DOUBLE)
        self.bn = nn.BatchNorm2d(6, **DOUBLE)
        self.relu = nn.ReLU()
        for name, module in modules.items():
            self.add_module(name, module)
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.bn(self.conv(x)), x)

    def scaled(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class Configured(nn.Module):
    """A block whose forward asks for much."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1, **DOUBLE)
        self.bn = nn.BatchNorm2d(6, **DOUBLE)
        self.relu = nn.ReLU()
        self.drop = nn.Identity()
        self.tail = nn.ModuleList([nn.Identity()])
        self.shortcut: nn.Module | None = None
        self.register_parameter("scale", None)
        self.factor = 1.0

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        y += x if self.shortcut is None else self.shortcut(x)
        y = self.relu(self.drop(y))
        if extra is not None:
            y = y + extra
        if self.scale is not None:
            y = y * self.scale
        for module in self.tail:
            y = module(y)
        return y * self.factor
