"""The one layer: a grouping, a correction, a tracking rule and an evaluation rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx.proxy import Proxy

from .activation import Activation, require_activation
from .checks import check_channels, check_example_weight
from .grouping import Grouping
from .limits import AT_REST, UNLIMITED, Limits
from .moments import Moments
from .occasions import Occasion, occasion_of
from .ops.dispatch import evaluate, normalize, target_of, train
from .ops.problem import Inputs, Running, Settings, Target
from .ops.tracking import Rule, Tracking, rule_of
from .state import State, Sync
from .substitution import warn_of_patches
from .workers.batch import normalize_over_workers
from .workers.group import Workers


class Norm(State):
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
        act: activation applied to the output: None, "relu", "relu6", "leaky_relu", "silu", "gelu"
            or "hardswish".
        sync: what workers have in common (see `renorm.synchronize`): None for nothing, "running" for the running
            statistics, "batch" for the statistics of the batch.

    Raises:
        TypeError: a group's size is not an integer, or `limits` are no `Limits`.
        ValueError: an option is out of range, or needs running statistics that are not tracked.

    Example:
        >>> layer = Norm(4, examples_per_group=2, channels_per_group=2, limits=Limits.over(1_000))
        >>> layer(torch.randn(6, 4, 8, 8)).shape
        torch.Size([6, 4, 8, 8])
    """

    input_ranks: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

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
        sync: Sync | None = None,
    ) -> None:
        nn.Module.__init__(self)  # what torch's batch norm would make is made by `_register`
        self.grouping = Grouping(examples_per_group, channels_per_group)
        check_channels(num_features, channels_per_group)
        rule_of(tracking)
        require_activation(act)
        if not isinstance(limits, Limits | None):
            raise TypeError(
                "limits must be renorm.Limits, as Limits.over(total_steps) or Limits.constant(), or None, "
                f"got {limits!r}"
            )
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
        self.synchronize(sync, Workers())
        self._register(device, dtype, bias)

    @property
    def example_weight(self) -> float:
        """Alpha in [0, 1]: the weight of an example's own statistics at evaluation."""
        return self._example_weight

    @example_weight.setter
    def example_weight(self, value: float) -> None:
        check_example_weight(value)
        if value > 0 and not self.track_running_stats and self._buffers.get("running_mean") is None:
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

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        act: Activation | None = None,
    ) -> Tensor:
        """Normalize a batch, and in training move the running statistics.

        Args:
            input: (N, C, *S), floating point.
            mask: True where an element counts, (N, *S) or broadcastable to it; other elements touch neither
                statistics nor gradients, and their output is 0.
            residual: added before the activation, shape of the input.
            act: activation of this call, for a layer without one of its own.

        Returns:
            The output, shape and dtype of the input.

        Raises:
            TypeError: the input is not floating point, or the mask not boolean.
            ValueError: a shape does not fit, a statistics group has a single element and there are no limits, or the
                layer has an activation of its own and another is given.
        """
        stand_in: Any = input
        if isinstance(stand_in, Proxy):
            return self._traced(stand_in, {"mask": mask, "residual": residual, "act": act})
        self._check(input)
        own = self._fused_activation()
        if act is not None and own is not None:
            raise ValueError(f"act must be None for a layer that has act={own!r} of its own, got {act!r}")
        # from the dict, since every attribute of a module that is a parameter costs half a microsecond
        parameters: dict[str, Any] = self._parameters
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401  # get() would ask for both
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401  # as above
        return self._finish(self._normalize(Inputs(input, weight, bias, mask, residual), act or own))

    def _traced(self, input: Proxy, options: dict[str, Any]) -> Tensor:
        """One call for torch.fx, as torch's own layers are, though they alone are leaves of its tracers."""
        tracer: Any = input.tracer
        given = {name: option for name, option in options.items() if option is not None}
        output: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), given)
        return output

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
        if not torch.compiler.is_compiling():
            warn_of_patches(self)

    def _normalize(self, inputs: Inputs, act: Activation | None) -> Tensor:
        buffers: dict[str, Any] = self._buffers
        has_statistics = buffers["running_mean"] is not None
        if not self.training and has_statistics:
            running = Running(buffers["running_mean"], buffers["running_var"])
            return evaluate(inputs, Settings(self.grouping, self._eps, act), running, self.example_weight)
        # the compiler must meet a float of the module outside autograd.Function first
        settings = Settings(self.grouping, self._eps * 1.0, act)
        if not has_statistics:
            return self._by_batch(inputs, settings, None)[0]
        state, limits = self._state(), self._limits_now()
        occasion = occasion_of(self, state, self.effective_blocks(), sees_state=limits is not None)
        if self.sync is not None and self.workers.number > 1:
            occasion = occasion or Occasion(state, "batch", moves=True)
        if occasion is not None:
            return self._normalize_apart(inputs, settings, occasion)
        return train(inputs, settings, state, limits, Rule(self.tracking, self._momentum))

    @contextmanager
    def adapting(self, momentum: float) -> Iterator[None]:
        """Let every batch move the statistics, corrected towards them without limits, whatever the settings are."""
        settings: Any = vars(self)
        names = ("limits", "tracking", "track_running_stats", "estimates", "blocks", "sync", "pool", "_momentum")
        before = {name: settings[name] for name in names if name in settings}
        meanwhile = (UNLIMITED, "total", True, False, (), None, None, momentum)
        settings.update(zip(names, meanwhile, strict=True))
        try:
            yield
        finally:
            for name in names:
                settings.pop(name, None)
            settings.update(before)

    def _limits_now(self) -> Limits | None:
        return AT_REST if self.estimates and self.limits is not None else self.limits

    def _normalize_apart(self, inputs: Inputs, settings: Settings, occasion: Occasion) -> Tensor:
        """A training forward that is not the ordinary one: in a block, in a checkpoint, or with other workers."""
        if occasion.statistics == "running":
            # copies, since the buffers may move before the backward
            running = Running(occasion.state.mean.clone(), occasion.state.var.clone())
            return evaluate(inputs, settings, running, self.example_weight)
        y, batches = self._by_batch(inputs, settings, target_of(inputs, occasion.state, self._limits_now()))
        if torch.compiler.is_compiling() and self.merges:
            return self.commit_in_graph(y, batches) if occasion.moves else y
        if occasion.moves:
            self.commit(batches)
        self._merge_after(y, occasion)
        return y

    def _by_batch(self, inputs: Inputs, settings: Settings, target: Target | None) -> tuple[Tensor, list[Moments]]:
        """The output, and the moments of the batch; one of no elements that is not finite if a worker was left out."""
        if self.sync != "batch" or not self.training or self.workers.number == 1:  # evaluation waits for nobody
            y, moments = normalize(inputs, settings, target)
            return y, [moments]
        y, moments, left_out = normalize_over_workers(inputs, settings, target, self.workers)
        nothing = torch.zeros_like(moments.mean)
        return y, [moments, Moments(nothing.masked_fill(left_out > 0, torch.nan), nothing, nothing[:, :1])]

    def _merge_after(self, y: Tensor, occasion: Occasion) -> None:
        pool = self.merging_pool()
        if pool is None:
            return
        if y.requires_grad or occasion.in_checkpoint:
            pool.expect_backward()
        if y.requires_grad:
            y.register_hook(pool.merge_in_backward)
        elif occasion.moves and not (torch.is_grad_enabled() or occasion.in_checkpoint or self.blocks):
            pool.merge([self])  # no backward pass will come

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
        if self.sync is not None:
            parts.append(f"sync={self.sync!r}")
        if self.limits is not None:
            parts.append(f"limits={self.limits}")
            if self.limits.start > 0:
                parts.append(f"plain batch norm until step {self.limits.start}")
        return ", ".join(parts)
