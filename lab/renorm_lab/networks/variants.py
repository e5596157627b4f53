"""Changes to group norm that the papers tried without success."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

import renorm

_NOISE = 0.1  # standard deviation, of means in running standard deviations, of standard deviations relative to them
_ELEMENTS = 2_048  # of a group: 8 channels of 16 x 16 pixels


class _VariedGroupNorm(renorm.Norm):
    """Group norm with running statistics; subclasses change how it normalizes in training.

    Args:
        num_features: number of channels.
        total_steps: length of the training.
        **options: of `renorm.Norm`.
    """

    def __init__(self, num_features: int, *, total_steps: int, **options: object) -> None:
        super().__init__(num_features, **options)  # type: ignore[arg-type]
        self.total_steps = total_steps

    def forward(self, x: Tensor, *others: object) -> Tensor:
        """Normalize, (N, C, *S) to the same shape."""
        assert all(other is None for other in others), "variants take no mask, residual or activation"
        channels = self.channels(x)
        if not self.training:
            return renorm.functional.weighted_batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias,
                example_weight=self.example_weight, channels_per_group=channels, eps=self.eps,
            )  # fmt: skip
        with torch.no_grad():
            super().forward(x)  # moves the running statistics
        shape = (1, -1) + (1,) * (x.ndim - 2)
        assert self.weight is not None
        assert self.bias is not None
        return self.normalized(x, channels) * self.weight.view(shape) + self.bias.view(shape)

    def channels(self, x: Tensor) -> int:
        """Channels in a group."""
        return self.channels_per_group

    def normalized(self, x: Tensor, channels: int) -> Tensor:
        """The training's output before gamma and beta."""
        y, _ = renorm.functional.batch_norm(x, examples_per_group=1, channels_per_group=channels, eps=self.eps)
        return y


class NoisyGroupNorm(_VariedGroupNorm):
    """Gaussian noise on the statistics, as large as the moving averages of them say."""

    def normalized(self, x: Tensor, channels: int) -> Tensor:
        """The training's output before gamma and beta."""
        y, moments = renorm.functional.batch_norm(x, examples_per_group=1, channels_per_group=channels, eps=self.eps)
        own = _sigma(moments.mean, moments.var, channels, self.eps)  # (N, C / channels)
        running = _sigma(self.running_mean[None], self.running_var[None], channels, self.eps)
        shift = _NOISE * torch.randn_like(own) * running / own
        scale = 1 + _NOISE * torch.randn_like(own)
        shape = (*own.shape, *(1,) * (x.ndim - 1))
        grouped = y.unflatten(1, (-1, channels))
        noisy: Tensor = (grouped - shift.view(shape)) / scale.view(shape)
        return noisy.flatten(1, 2)


class RandomGroupNorm(_VariedGroupNorm):
    """Other channels in a group at every step."""

    def normalized(self, x: Tensor, channels: int) -> Tensor:
        """The training's output before gamma and beta."""
        order = torch.randperm(x.shape[1]).to(x.device)
        return super().normalized(x[:, order], channels)[:, order.argsort()]


class GrowingGroupNorm(_VariedGroupNorm):
    """Groups of a quarter of the channels at first, of a half in the training's second third, then of all."""

    def channels(self, x: Tensor) -> int:
        """Channels in a group."""
        return max(1, self.channels_per_group >> (2 - self._third()))

    def _third(self) -> int:
        return min(2, 3 * int(self.num_batches_tracked) // self.total_steps)


class ShrinkingGroupNorm(GrowingGroupNorm):
    """Groups of four times the channels at first, of twice in the training's second third, then as they are."""

    def channels(self, x: Tensor) -> int:
        """Channels in a group."""
        return min(self.num_features, self.channels_per_group << (2 - self._third()))


class EvenGroupNorm(_VariedGroupNorm):
    """As many elements in a group in every layer, whatever its height and width."""

    def channels(self, x: Tensor) -> int:
        """Channels in a group."""
        wanted = max(1, _ELEMENTS // prod(x.shape[2:]))
        return max(k for k in range(1, self.num_features + 1) if self.num_features % k == 0 and k <= wanted)


VARIANTS: dict[str, type[renorm.Norm]] = {
    "noisy statistics": NoisyGroupNorm,
    "random groups": RandomGroupNorm,
    "growing groups": GrowingGroupNorm,
    "shrinking groups": ShrinkingGroupNorm,
    "even groups": EvenGroupNorm,
}


def _sigma(mean: Tensor, var: Tensor, channels: int, eps: float) -> Tensor:
    means = mean.unflatten(1, (-1, channels))
    pooled = var.unflatten(1, (-1, channels)).mean(2) + means.var(2, correction=0)
    sigma: Tensor = (pooled + eps).sqrt()
    return sigma
