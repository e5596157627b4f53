"""The named layers: settings of `Norm`, for 1d, 2d and 3d input."""

from __future__ import annotations

import torch
from torch import nn

from .activation import Activation
from .limits import Limits
from .norm import Norm
from .ops.tracking import Tracking
from .state import Sync

_PAPER_LIMITS = Limits()


class BatchNorm(Norm):
    """Batch norm: nn.BatchNorm, argument for argument, with example weighing, masks and half-precision safety.

    Without a dimension it takes what the 1d, 2d and 3d layers take, as nn.SyncBatchNorm does.

    Args:
        num_features: C, the number of channels.
        **options: those of `Norm`, with nn.BatchNorm's defaults.

    Source:
        Ioffe & Szegedy 2015.

    Example:
        >>> layer = BatchNorm2d(3)
        >>> layer.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        <All keys matched successfully>
    """


class BatchRenorm(Norm):
    """Batch renormalization: in training, batch statistics corrected towards the running statistics.

    What the network computes in training is what it computes at evaluation, within the limits, so that small
    batches and batches of dependent examples no longer ruin the trained model. A group of a single element is
    allowed: its output is bias + weight * d, and no gradient flows through it.

    Args:
        num_features: C, the number of channels.
        eps: added to variances.
        momentum: weight of a new batch in the running statistics; None for the cumulative average.
        affine: whether there are weight (gamma) and bias (beta).
        track_running_stats: must be True as long as there are limits.
        device: of parameters and buffers.
        dtype: of parameters.
        bias: whether there is a bias, if affine.
        limits: of the correction, by step. The default is the paper's, plain batch norm for 5,000 steps: for
            another length of training pass `Limits.over(total_steps)`.
        examples_per_group: see `Norm`.
        channels_per_group: see `Norm`.
        tracking: see `Norm`; "std" is the paper's.
        example_weight: see `Norm`.
        act: see `Norm`.
        sync: see `Norm`.

    Source:
        Ioffe 2017, algorithm 1 and section 4.

    Example:
        >>> BatchRenorm2d(64, limits=Limits.over(1_300))
        BatchRenorm2d(64, eps=1e-05, momentum=0.01, affine=True, track_running_stats=True, tracking='std',
            limits=Limits(r_max=3.0, d_max=5.0, start=50, r_end=400, d_end=250), plain batch norm until step 50)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        limits: Limits | None = _PAPER_LIMITS,
        examples_per_group: int | None = None,
        channels_per_group: int = 1,
        tracking: Tracking = "std",
        example_weight: float = 0.0,
        act: Activation | None = None,
        sync: Sync | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, limits=limits, examples_per_group=examples_per_group, channels_per_group=channels_per_group,
            tracking=tracking, example_weight=example_weight, act=act, sync=sync,
        )  # fmt: skip


class GhostBatchNorm(Norm):
    """Ghost batch norm: statistics over a few consecutive examples of the batch, a regularizer.

    One batch is one update of the running statistics, from the moments of the whole batch.

    Args:
        num_features: C, the number of channels.
        examples_per_group: size of a ghost batch.
        eps: added to variances.
        momentum: weight of a new batch in the running statistics; None for the cumulative average.
        affine: whether there are weight (gamma) and bias (beta).
        track_running_stats: whether there are running statistics.
        device: of parameters and buffers.
        dtype: of parameters.
        bias: whether there is a bias, if affine.
        limits: see `Norm`.
        channels_per_group: see `Norm`.
        tracking: see `Norm`; "total" is the paper's.
        example_weight: see `Norm`; the smaller the ghost batch, the more it helps.
        act: see `Norm`.
        sync: see `Norm`.

    Source:
        Hoffer et al. 2017; Summers & Dinneen 2020, section 3.2, equation 4.

    Example:
        >>> GhostBatchNorm2d(64, 16)(torch.randn(128, 64, 4, 4)).shape
        torch.Size([128, 64, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        examples_per_group: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        limits: Limits | None = None,
        channels_per_group: int = 1,
        tracking: Tracking = "total",
        example_weight: float = 0.0,
        act: Activation | None = None,
        sync: Sync | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, limits=limits, examples_per_group=examples_per_group, channels_per_group=channels_per_group,
            tracking=tracking, example_weight=example_weight, act=act, sync=sync,
        )  # fmt: skip


class BatchGroupNorm(Norm):
    """Batch-group norm: statistics over a group of channels in a few examples, for very small batches.

    Args:
        num_features: C, the number of channels.
        num_groups: number of channel groups; must divide `num_features`.
        eps: added to variances.
        momentum: weight of a new batch in the running statistics; None for the cumulative average.
        affine: whether there are weight (gamma) and bias (beta).
        track_running_stats: whether there are running statistics.
        device: of parameters and buffers.
        dtype: of parameters.
        bias: whether there is a bias, if affine.
        limits: see `Norm`.
        examples_per_group: consecutive examples that share statistics; 1 is group norm with running statistics.
        tracking: see `Norm`; "total" is the paper's.
        example_weight: see `Norm`.
        act: see `Norm`.
        sync: see `Norm`.

    Raises:
        ValueError: `num_groups` does not divide `num_features`.

    Source:
        Summers & Dinneen 2020, section 3.4.

    Example:
        >>> BatchGroupNorm2d(64, 16).channels_per_group
        4
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        limits: Limits | None = None,
        examples_per_group: int | None = 2,
        tracking: Tracking = "total",
        example_weight: float = 0.0,
        act: Activation | None = None,
        sync: Sync | None = None,
    ) -> None:
        if num_groups < 1 or num_features % num_groups:
            raise ValueError(f"num_groups must divide num_features={num_features}, got {num_groups}")
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, limits=limits, examples_per_group=examples_per_group,
            channels_per_group=num_features // num_groups, tracking=tracking, example_weight=example_weight, act=act,
            sync=sync,
        )  # fmt: skip

    @property
    def num_groups(self) -> int:
        """Number of channel groups."""
        return self.num_features // self.channels_per_group


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """`BatchNorm` for input of shape (N, C) or (N, C, L)."""

    input_ranks = (2, 3)


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """`BatchNorm` for input of shape (N, C, H, W)."""

    input_ranks = (4,)


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """`BatchNorm` for input of shape (N, C, D, H, W)."""

    input_ranks = (5,)


class BatchRenorm1d(BatchRenorm, nn.BatchNorm1d):
    """`BatchRenorm` for input of shape (N, C) or (N, C, L)."""

    input_ranks = (2, 3)


class BatchRenorm2d(BatchRenorm, nn.BatchNorm2d):
    """`BatchRenorm` for input of shape (N, C, H, W)."""

    input_ranks = (4,)


class BatchRenorm3d(BatchRenorm, nn.BatchNorm3d):
    """`BatchRenorm` for input of shape (N, C, D, H, W)."""

    input_ranks = (5,)


class GhostBatchNorm1d(GhostBatchNorm, nn.BatchNorm1d):
    """`GhostBatchNorm` for input of shape (N, C) or (N, C, L)."""

    input_ranks = (2, 3)


class GhostBatchNorm2d(GhostBatchNorm, nn.BatchNorm2d):
    """`GhostBatchNorm` for input of shape (N, C, H, W)."""

    input_ranks = (4,)


class GhostBatchNorm3d(GhostBatchNorm, nn.BatchNorm3d):
    """`GhostBatchNorm` for input of shape (N, C, D, H, W)."""

    input_ranks = (5,)


class BatchGroupNorm1d(BatchGroupNorm, nn.BatchNorm1d):
    """`BatchGroupNorm` for input of shape (N, C) or (N, C, L)."""

    input_ranks = (2, 3)


class BatchGroupNorm2d(BatchGroupNorm, nn.BatchNorm2d):
    """`BatchGroupNorm` for input of shape (N, C, H, W)."""

    input_ranks = (4,)


class BatchGroupNorm3d(BatchGroupNorm, nn.BatchNorm3d):
    """`BatchGroupNorm` for input of shape (N, C, D, H, W)."""

    input_ranks = (5,)
