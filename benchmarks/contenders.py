"""Who is compared: ours, torch's layers, and batch renorm as people write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import onednn
import renorm

BATCH_NORM, BATCH_NORM_COMPILED = "nn.BatchNorm2d", "nn.BatchNorm2d compiled"
PLAIN, PLAIN_COMPILED = "plain code", "plain code compiled"
GROUP_NORM = "nn.GroupNorm"
COPY = "copy"
ONEDNN = "oneDNN"
OURS, OUR_BATCH, OUR_GHOST = "BatchRenorm2d", "BatchNorm2d", "GhostBatchNorm2d"
OUR_BATCH_GROUP, OUR_GROUP = "BatchGroupNorm2d", "BatchGroupNorm2d, 1 example"
OURS_FUSED = "BatchRenorm2d, fused"
OURS_COMPILED, OURS_FUSED_COMPILED = "BatchRenorm2d compiled", "BatchRenorm2d, fused, compiled"
OURS_WEIGHTED = "BatchRenorm2d, alpha = 0.1"
APART, MERGED, SHARED = "sync=None", "sync=running", "sync=batch"
SB3_CONTRIB, RENORM = "sb3-contrib", "renorm"  # whose layers
NO_BLOCK, ACCUMULATE, FREEZE, MONITOR = "no block", "accumulate", "freeze", "monitor, every=1"

_GROUPS = 16  # divides the channels of every layer measured
_GHOST_EXAMPLES = 4

# From the number of channels and whether ReLU follows; called with x and, perhaps, a residual.
Make = Callable[[int, bool], nn.Module]


class PlainBatchRenorm2d(nn.Module):
    """Batch renormalization as public repositories write it: one tensor operation after the other.

    Args:
        num_features: C, the number of channels.
        eps: added to variances.
        momentum: weight of a new batch in the running statistics.
        r_max: r stays within [1 / r_max, r_max].
        d_max: d stays within [-d_max, d_max].
    """

    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.01, r_max: float = 3.0, d_max: float = 5.0
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.r_max, self.d_max = eps, momentum, r_max, d_max
        self.weight = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.register_buffer("running_mean", torch.zeros(1, num_features, 1, 1))
        self.register_buffer("running_std", torch.ones(1, num_features, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a batch, (N, C, H, W), and in training move the running statistics."""
        if not self.training:
            return self.weight * (x - self.running_mean) / self.running_std + self.bias
        mean = x.mean([0, 2, 3], keepdim=True)
        std = (x.var([0, 2, 3], unbiased=False, keepdim=True) + self.eps).sqrt()
        r = (std.detach() / self.running_std).clamp(1 / self.r_max, self.r_max)
        d = ((mean.detach() - self.running_mean) / self.running_std).clamp(-self.d_max, self.d_max)
        y = (x - mean) / std * r + d
        self.running_mean += self.momentum * (mean.detach() - self.running_mean)
        self.running_std += self.momentum * (std.detach() - self.running_std)
        return self.weight * y + self.bias


class Composed(nn.Module):
    """A norm, then residual and ReLU in place, as torchvision's networks have it: the fastest without fusion.

    Args:
        norm: the norm layer.
        relu: whether ReLU follows.
    """

    def __init__(self, norm: nn.Module, relu: bool) -> None:
        super().__init__()
        self.norm = norm
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize, add the residual, apply ReLU."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y += residual
        return F.relu_(y) if self.relu else y


def compiled(make: Make) -> Make:
    """The same contender under torch.compile, without falling back to eager anywhere."""

    def make_compiled(channels: int, relu: bool) -> nn.Module:
        layer = make(channels, relu)
        layer.compile(fullgraph=True, dynamic=False)
        return layer

    return make_compiled


def _composed(norm: Callable[[int], nn.Module]) -> Make:
    return lambda channels, relu: Composed(norm(channels), relu)


def _fused(layer: type[renorm.Norm], **options: Any) -> Make:
    return lambda channels, relu: layer(channels, act="relu" if relu else None, **options)


_LIMITS = renorm.Limits.constant()
_plain = _composed(PlainBatchRenorm2d)
_batch_norm = _composed(nn.BatchNorm2d)
_ours = _fused(renorm.BatchRenorm2d, limits=_LIMITS)
EAGER: dict[str, Make] = {
    BATCH_NORM: _batch_norm,
    PLAIN: _plain,
    GROUP_NORM: _composed(lambda channels: nn.GroupNorm(_GROUPS, channels)),
    OURS: _ours,
}
# In the layout that it is made for; elsewhere it is not what anybody would run.
ANCHOR: dict[str, Make] = {ONEDNN: onednn.OneDnnBatchNorm2d} if onednn.available() else {}
COMPILED: dict[str, Make] = {
    BATCH_NORM_COMPILED: compiled(_batch_norm),
    PLAIN_COMPILED: compiled(_plain),
    OURS_COMPILED: compiled(_ours),
}
GROUPINGS: dict[str, Make] = {
    OUR_BATCH: _fused(renorm.BatchNorm2d),
    OUR_GHOST: _fused(renorm.GhostBatchNorm2d, examples_per_group=_GHOST_EXAMPLES),
    OUR_BATCH_GROUP: _fused(renorm.BatchGroupNorm2d, num_groups=_GROUPS),
    OUR_GROUP: _fused(renorm.BatchGroupNorm2d, num_groups=_GROUPS, examples_per_group=1),
}
EVALUATED: dict[str, Make] = {
    BATCH_NORM: _batch_norm,
    OURS: _ours,
    OURS_WEIGHTED: _fused(renorm.BatchRenorm2d, limits=_LIMITS, example_weight=0.1),
}
