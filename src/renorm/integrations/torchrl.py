"""TorchRL's BatchRenorm1d, argument for argument, by renorm."""

from __future__ import annotations

from .. import layers
from ..limits import Limits


class BatchRenorm1d(layers.BatchRenorm1d):
    """`renorm.BatchRenorm1d` in the place of `torchrl.modules.BatchRenorm1d`, as `norm_class` of TorchRL's networks.

    Takes input (N, C) or (N, C, L). The state dict is TorchRL's, key for key. With `smooth` the limits relax during the
    warm-up; TorchRL fades in r and d themselves, by a factor that goes on growing afterwards, so that r leaves its
    limits. TorchRL is not imported.

    Args:
        num_features: C, the number of channels.
        momentum: weight of a new batch in the running statistics.
        eps: added to variances.
        max_r: r stays within [1 / max_r, max_r].
        max_d: d stays within [-max_d, max_d].
        warmup_steps: batches before the correction is on.
        smooth: whether it comes in little by little until then, instead of at once.

    Source:
        Ioffe 2017, algorithm 1.

    Example:
        >>> BatchRenorm1d(num_features=64, warmup_steps=500).limits
        Limits(r_max=3.0, d_max=5.0, start=500, r_end=500, d_end=500)
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.01,
        eps: float = 1e-5,
        max_r: float = 3.0,
        max_d: float = 5.0,
        warmup_steps: int = 10_000,
        smooth: bool = False,
    ) -> None:
        limits = Limits(max_r, max_d, 0 if smooth else warmup_steps, r_end=warmup_steps, d_end=warmup_steps)
        super().__init__(num_features, eps, momentum, limits=limits, tracking="var")
