"""The formulas of the papers, one by one, in float64 and as naively as they can be written.

Nothing here comes from the library: groups are loops, moving averages are averaged as what they are averages of
(standard deviations, second moments), and gradients are autograd's, with `detach` where the paper stops them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Ramps:
    """r_max(t) and d_max(t): 1 and 0 up to `start`, then straight lines to the full limits."""

    r_max: float
    d_max: float
    start: int = 0
    r_end: int = 0
    d_end: int = 0

    def at(self, t: int) -> tuple[float, float]:
        return self._line(t, 1.0, self.r_max, self.r_end), self._line(t, 0.0, self.d_max, self.d_end)

    def _line(self, t: int, low: float, high: float, end: int) -> float:
        if t >= end:
            return high
        if t <= self.start:
            return low
        return low + (high - low) * (t - self.start) / (end - self.start)


def example_groups(num_examples: int, size: int | None) -> list[list[int]]:
    """Consecutive examples; what is left over is a smaller last group, but a single one joins its predecessor."""
    everyone = list(range(num_examples))
    if size is None:
        return [everyone]
    groups = [everyone[i : i + size] for i in range(0, num_examples, size)]
    if size > 1 and len(groups) > 1 and len(groups[-1]) == 1:
        left_over = groups.pop()
        groups[-1] += left_over
    return groups


def channel_groups(num_channels: int, size: int) -> list[list[int]]:
    return [list(range(j, j + size)) for j in range(0, num_channels, size)]


def mean_and_var(values: Tensor) -> tuple[Tensor, Tensor]:
    mean = values.sum() / values.numel()
    return mean, ((values - mean) ** 2).sum() / values.numel()


@dataclass
class Oracle:
    """A normalization layer: a grouping, a correction, a tracking rule and an evaluation rule."""

    num_features: int
    eps: float = 1e-5
    momentum: float | None = 0.1
    weight: Tensor | None = None
    bias: Tensor | None = None
    limits: Ramps | None = None
    examples_per_group: int | None = None
    channels_per_group: int = 1
    tracking: str = "var"
    example_weight: float = 0.0
    stop_gradient: bool = True

    steps: int = 0
    gradient_scale: float = 0.0  # largest gamma * r / sigma of the last batch: what a gradient is made of
    condition: float = 1.0  # largest |mean| / sigma of its groups: how many digits of the input cancel
    corrections: list[tuple[float, float]] = field(default_factory=list)  # r and d of its groups

    def __post_init__(self) -> None:
        self.mean = torch.zeros(self.num_features, dtype=torch.float64)
        self.var = torch.ones(self.num_features, dtype=torch.float64)

    def running(self, channels: list[int]) -> tuple[Tensor, Tensor]:
        """mu_j and V_j: what a group of channels sees of the running statistics."""
        mean, spread = mean_and_var(self.mean[channels])
        return mean, self.var[channels].sum() / len(channels) + spread

    def train(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        keep = self.counted(x, mask)
        clean = x.double().masked_fill(~keep, 0.0)
        y = torch.zeros_like(clean)
        self.gradient_scale, self.condition, self.corrections = 0.0, 1.0, []
        for examples in example_groups(x.shape[0], self.examples_per_group):
            for channels in channel_groups(x.shape[1], self.channels_per_group):
                self._normalize_group(clean, keep, y, examples, channels)
        self._track(clean.detach(), keep)
        return y

    def _normalize_group(self, x: Tensor, keep: Tensor, y: Tensor, examples: list[int], channels: list[int]) -> None:
        block = torch.tensor(examples)[:, None], torch.tensor(channels)[None, :]
        values = x[block][keep[block]]
        if values.numel() == 0:
            return
        mean, var = mean_and_var(values)
        sigma = torch.sqrt(var + self.eps)
        r, d = self._correction(mean, sigma, channels)
        self.corrections.append((float(r.detach()), float(d.detach())))
        self.condition = max(self.condition, float((mean.abs() / sigma).detach()))
        for i in examples:
            for c in channels:
                gamma = self.weight[c] if self.weight is not None else 1.0
                beta = self.bias[c] if self.bias is not None else 0.0
                x_hat = (x[i, c] - mean) / sigma * r + d
                y[i, c] = torch.where(keep[i, c], gamma * x_hat + beta, 0.0)
                self.gradient_scale = max(self.gradient_scale, abs(float((gamma * r / sigma).detach())))

    def _correction(self, mean: Tensor, sigma: Tensor, channels: list[int]) -> tuple[Tensor, Tensor]:
        if self.limits is None:
            return torch.ones_like(mean), torch.zeros_like(mean)
        r_max, d_max = self.limits.at(self.steps)
        mu, variance = self.running(channels)
        running_sigma = torch.sqrt(variance + self.eps)
        r = torch.clip(sigma / running_sigma, 1 / r_max, r_max)
        d = torch.clip((mean - mu) / running_sigma, -d_max, d_max)
        return (r.detach(), d.detach()) if self.stop_gradient else (r, d)

    def _track(self, x: Tensor, keep: Tensor) -> None:
        if not keep.any() or not x.isfinite().all():
            return
        m = 1 / (self.steps + 1) if self.momentum is None else self.momentum
        groups = example_groups(x.shape[0], self.examples_per_group)
        elements = max(int(keep[g, 0].sum()) * self.channels_per_group for g in groups)
        mean, var = self.mean.clone(), self.var.clone()
        for c in range(self.num_features):
            batch = x[:, c][keep[:, c]]
            batch_mean, batch_var = mean_and_var(batch)
            mean[c] = (1 - m) * self.mean[c] + m * batch_mean
            if self.tracking == "total":
                second = (1 - m) * (self.var[c] + self.mean[c] ** 2) + m * (batch_var + batch_mean**2)
                var[c] = second - mean[c] ** 2
            elif elements == 1 or (self.tracking == "var" and batch.numel() == 1):
                continue  # nothing is known of the spread
            elif self.tracking == "var":
                var[c] = (1 - m) * self.var[c] + m * batch.var(correction=1)
            elif self.tracking == "std":
                total = torch.zeros((), dtype=torch.float64)
                for g in groups:
                    counted = x[g, c][keep[g, c]]
                    if counted.numel():
                        total = total + counted.numel() * torch.sqrt(mean_and_var(counted)[1] + self.eps)
                sigma = (1 - m) * torch.sqrt(self.var[c] + self.eps) + m * total / batch.numel()
                var[c] = sigma**2 - self.eps
        self.mean, self.var, self.steps = mean, var, self.steps + 1

    def evaluate(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        keep = self.counted(x, mask)
        x = x.double().masked_fill(~keep, 0.0)
        y = torch.zeros_like(x)
        self.gradient_scale, self.condition = 0.0, 1.0
        for i in range(x.shape[0]):
            for channels in channel_groups(x.shape[1], self.channels_per_group):
                mean, var = self.running(channels)
                own = x[i, channels][keep[i, channels]]
                if own.numel() and self.example_weight > 0:
                    # the first and second moment are averaged, and the variance follows from them
                    a, (e, v) = self.example_weight, mean_and_var(own)
                    second = (1 - a) * (var + mean**2) + a * (v + e**2)
                    mean = (1 - a) * mean + a * e
                    var = second - mean**2
                sigma = torch.sqrt(var + self.eps)
                self.condition = max(self.condition, float((mean.abs() / sigma).detach()))
                for c in channels:
                    gamma = self.weight[c] if self.weight is not None else 1.0
                    beta = self.bias[c] if self.bias is not None else 0.0
                    y[i, c] = torch.where(keep[i, c], gamma * (x[i, c] - mean) / sigma + beta, 0.0)
                    self.gradient_scale = max(self.gradient_scale, abs(float((gamma / sigma).detach())))
        return y

    def counted(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return torch.ones_like(x, dtype=torch.bool)
        positions = torch.broadcast_to(mask, (x.shape[0], *x.shape[2:]))
        return torch.stack([positions] * x.shape[1], dim=1)


def float32_tolerance(oracle: Oracle) -> float:
    """1e-5, unless a group's mean is so many sigmas from 0 that float32 cannot tell its elements apart as well."""
    return 1e-5 * max(1.0, oracle.condition / 32)


def assert_agrees(actual: Tensor, expected: Tensor, tolerance: float = 1e-5, scale: float = 0.0) -> None:
    """Every element within `tolerance` of the largest expected one, or of `scale` where that is larger."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    size = max(float(expected.detach().abs().max()), scale)
    error = float((actual.detach().double() - expected.detach().double()).abs().max())
    assert error <= tolerance * size, f"off by {error:.2e} at size {size:.2e}, allowed {tolerance * size:.2e}"
