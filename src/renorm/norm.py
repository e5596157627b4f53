"""The one layer: a grouping, a correction, a tracking rule and an evaluation rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from . import functional as F
from .activation import Activation, require_activation
from .checks import check_channels, check_example_weight
from .grouping import Grouping
from .limits import Limits
from .moments import Moments
from .occasions import Blocks, counts, innermost_accumulation, occasion_of
from .ops.normalize import suits_kernels
from .step import correction, train
from .tracking import RunningState, Tracking, commit_together, require_tracking

_STATISTICS = ("running_mean", "running_var")
_STATE = (*_STATISTICS, "num_batches_tracked", "num_batches_skipped")


class Norm(nn.Module):
    """Batch normalization with everything that can be set about it; the named layers are settings of this one.

    The state dict is nn.BatchNorm's, key for key, in both directions. Running statistics are kept in float32 at
    least, also after `.half()`; the output has the input's dtype.

    A training batch whose moments are not finite leaves the running statistics and the step as they were, and is
    counted in `num_batches_skipped`. An empty batch passes through.

    Args:
        num_features: C, the number of channels.
        eps: added to variances.
        momentum: weight of a new batch in the running statistics; None for the cumulative average.
        affine: whether there are weight (gamma) and bias (beta), (C,) each.
        track_running_stats: whether there are running statistics; without them evaluation normalizes by the batch.
        device: of parameters and buffers.
        dtype: of parameters; buffers have float32 at least.
        bias: whether there is a bias, if affine.
        limits: of batch renormalization's correction, by step; None for batch norm.
        examples_per_group: consecutive examples that share statistics in training; None for the whole batch.
            What is left over forms a smaller last group; a single example joins its predecessor.
        channels_per_group: consecutive channels that share statistics; must divide `num_features`.
        tracking: how the running variance moves, "std", "var" or "total" (see `functional.update_running`).
        example_weight: alpha in [0, 1], the weight of an example's own statistics at evaluation. An ordinary
            attribute: set it at any time.
        act: activation applied to the output: None, "relu", "relu6", "leaky_relu", "silu" or "gelu".

    Raises:
        TypeError: a group's size is not an integer.
        ValueError: an option is out of range, or needs running statistics that are not tracked.

    Example:
        >>> layer = Norm(4, examples_per_group=2, channels_per_group=2, limits=Limits.over(1_000))
        >>> layer(torch.randn(6, 4, 8, 8)).shape
        torch.Size([6, 4, 8, 8])
    """

    input_ranks: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    # None without track_running_stats; every use is behind that question
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    num_batches_skipped: Tensor

    blocks: Blocks = ()  # of `renorm.accumulate` and `renorm.freeze`, from the outermost

    _version = 2  # nn.BatchNorm's, whose checkpoints had no num_batches_tracked before

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        limits: Limits | None = None,
        examples_per_group: int | None = None,
        channels_per_group: int = 1,
        tracking: Tracking = "var",
        example_weight: float = 0.0,
        act: Activation | None = None,
    ) -> None:
        super().__init__()
        self.grouping = Grouping(examples_per_group, channels_per_group)
        check_channels(num_features, channels_per_group)
        require_tracking(tracking)
        require_activation(act)
        if limits is not None and not track_running_stats:
            raise ValueError("limits need running statistics to correct towards: track_running_stats must be True")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.limits = limits
        self.tracking: Tracking = tracking
        self.example_weight = example_weight
        self.act: Activation | None = act
        self._register(device, dtype, bias)

    def _register(self, device: torch.device | str | None, dtype: torch.dtype | None, bias: bool) -> None:
        def parameter(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(self.num_features, device=device, dtype=dtype)) if wanted else None

        def statistic() -> Tensor | None:
            if not self.track_running_stats:
                return None
            wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
            return torch.empty(self.num_features, device=device, dtype=wide)

        def counter() -> Tensor | None:
            return torch.zeros((), dtype=torch.long, device=device) if self.track_running_stats else None

        self.register_parameter("weight", parameter(self.affine))
        self.register_parameter("bias", parameter(self.affine and bias))
        self.register_buffer("running_mean", statistic())
        self.register_buffer("running_var", statistic())
        self.register_buffer("num_batches_tracked", counter())
        self.register_buffer("num_batches_skipped", counter(), persistent=False)
        self.reset_parameters()

    @property
    def example_weight(self) -> float:
        """Alpha in [0, 1]: the weight of an example's own statistics at evaluation."""
        return self._example_weight

    @example_weight.setter
    def example_weight(self, value: float) -> None:
        check_example_weight(value)
        if value > 0 and not self.track_running_stats:
            raise ValueError(
                f"example_weight needs running statistics to weigh against: track_running_stats must be True, "
                f"got example_weight={value}"
            )
        self._example_weight = float(value)

    @property
    def examples_per_group(self) -> int | None:
        """Consecutive examples that share statistics in training; None for the whole batch."""
        return self.grouping.examples_per_group

    @property
    def channels_per_group(self) -> int:
        """Consecutive channels that share statistics."""
        return self.grouping.channels_per_group

    def reset_running_stats(self) -> None:
        """Forget every batch: mean 0, variance 1, step 0."""
        if not self.track_running_stats:
            return
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()
        self.num_batches_skipped.zero_()

    def reset_parameters(self) -> None:
        """Start anew: weight 1, bias 0, and no batch seen."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        act: Activation | None = None,
    ) -> Tensor:
        """Normalize a batch, and in training move the running statistics.

        Args:
            x: input, (N, C, *S), floating point.
            mask: True where an element counts, (N, *S) or broadcastable to it; other elements touch neither
                statistics nor gradients, and their output is 0.
            residual: added before the activation, shape of x.
            act: activation of this call, for a layer without one of its own.

        Returns:
            The output, shape and dtype of x.

        Raises:
            TypeError: x is not floating point, or the mask not boolean.
            ValueError: a shape does not fit, a statistics group has a single element and there are no limits, or the
                layer has an activation of its own and another is given.
        """
        self._check(x)
        own = self._fused_activation()
        if act is not None and own is not None:
            raise ValueError(f"act must be None for a layer that has act={own!r} of its own, got {act!r}")
        return self._finish(self._normalize(x, mask, residual, act or own))

    def _fused_activation(self) -> Activation | None:
        return self.act

    def _finish(self, y: Tensor) -> Tensor:
        """What comes after the activation; nothing, but for layers that hold modules of their own."""
        return y

    def _check(self, x: Tensor) -> None:
        if x.ndim not in self.input_ranks:
            ranks = " or ".join(f"{rank}d" for rank in self.input_ranks)
            raise ValueError(f"{type(self).__name__} takes {ranks} input, got x of shape {tuple(x.shape)}")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"x must have num_features={self.num_features} channels in dimension 1, got shape {tuple(x.shape)}"
            )

    def _normalize(self, x: Tensor, mask: Tensor | None, residual: Tensor | None, act: Activation | None) -> Tensor:
        if self.training or not self.track_running_stats:
            return self._normalize_batch(x, mask, residual, act)
        return self._evaluate(x, mask, residual, act, self.running_mean, self.running_var)

    def _evaluate(
        self,
        x: Tensor,
        mask: Tensor | None,
        residual: Tensor | None,
        act: Activation | None,
        running_mean: Tensor,
        running_var: Tensor,
    ) -> Tensor:
        return F.weighted_batch_norm(
            x, running_mean, running_var, self.weight, self.bias,
            example_weight=self.example_weight, mask=mask, channels_per_group=self.channels_per_group, eps=self.eps,
            residual=residual, act=act,
        )  # fmt: skip

    def _normalize_batch(
        self, x: Tensor, mask: Tensor | None, residual: Tensor | None, act: Activation | None
    ) -> Tensor:
        eps = self.eps * 1.0  # the compiler must meet a float of the module outside autograd.Function first
        if not self.track_running_stats:
            return F.normalize_batch(x, self.weight, self.bias, mask, None, self.grouping, eps, residual, act)[0]
        state = self._state()
        occasion = occasion_of(self, state, self.blocks, sees_state=self.limits is not None)
        if occasion is None:
            return train(
                x, self.weight, self.bias, mask, residual, state, self.limits, self.grouping, eps, act,
                self.tracking, self.momentum,
            )  # fmt: skip
        if occasion.statistics == "running":
            # copies, since the buffers may move before the backward
            mean, var = occasion.state.mean.clone(), occasion.state.var.clone()
            return self._evaluate(x, mask, residual, act, mean, var)
        running = correction(x, occasion.state, self.limits, suits_kernels(x, residual))
        y, moments = F.normalize_batch(x, self.weight, self.bias, mask, running, self.grouping, eps, residual, act)
        if occasion.moves:
            self.commit([moments])
        return y

    def commit(self, batches: Sequence[Moments]) -> None:
        """Move the running statistics once, by batches together; `renorm.accumulate` and `freeze` have their say.

        Args:
            batches: moments of every channel in every example group of each, (G, C).
        """
        if not counts(self.blocks):
            return
        accumulation = innermost_accumulation(self.blocks)
        if accumulation is not None:
            accumulation.batches.extend(batches)
            return
        commit_together(
            self._state(), batches, momentum=self.momentum, tracking=self.tracking,
            channels_per_group=self.channels_per_group, eps=self.eps,
        )  # fmt: skip

    def _state(self) -> RunningState:
        # from the dict, since every attribute of a module that is a buffer costs half a microsecond
        return RunningState(*(self._buffers[name] for name in _STATE))  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers[name] for name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, statistic in before.items():
            after = self._buffers[name]
            if statistic is not None and after is not None and after.dtype.itemsize < torch.float32.itemsize:
                self._buffers[name] = statistic.to(after.device, torch.float32)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if self.track_running_stats:
            if local_metadata.get("version", 1) < 2:
                state_dict.setdefault(prefix + "num_batches_tracked", torch.zeros((), dtype=torch.long))
            for name in _STATISTICS:
                loaded = state_dict.get(prefix + name)
                if loaded is not None:  # load_state_dict(assign=True) would take over half precision
                    state_dict[prefix + name] = loaded.to(torch.promote_types(loaded.dtype, torch.float32))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __getstate__(self) -> dict[str, Any]:
        # Copies are outside of the blocks, which would never end for them.
        return {name: value for name, value in self.__dict__.items() if name != "blocks"}

    def extra_repr(self) -> str:
        """Settings, as far as they are not nn.BatchNorm's."""
        parts = [
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}",
            f"track_running_stats={self.track_running_stats}",
        ]
        if self.examples_per_group is not None:
            parts.append(f"examples_per_group={self.examples_per_group}")
        if self.channels_per_group > 1:
            parts.append(f"channels_per_group={self.channels_per_group}")
        if self.tracking != "var":
            parts.append(f"tracking={self.tracking!r}")
        if self.example_weight > 0:
            parts.append(f"example_weight={self.example_weight}")
        if isinstance(self.act, str):
            parts.append(f"act={self.act!r}")
        if self.limits is not None:
            parts.append(f"limits={self.limits}")
            if self.limits.start > 0:
                parts.append(f"plain batch norm until step {self.limits.start}")
        return ", ".join(parts)
