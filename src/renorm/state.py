"""Parameters and running statistics: what a layer keeps, and how batches move it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from .checks import check_eps
from .grouping import Grouping
from .moments import Moments, accumulation_dtype
from .occasions import Blocks, Frozen, Statistics, counts, innermost_accumulation
from .ops.dispatch import track
from .ops.problem import RunningState, Settings
from .ops.tracking import Rule, Tracking
from .substitution import refuse_single_examples, refuse_substitution
from .workers.group import Workers
from .workers.pool import Pool, leave, merge_in_backward_of, pool_of, ticket_for
from .workers.sums import Summed, from_sums, to_sums

Sync = Literal["running", "batch"]
_serials = count()
_STATISTICS = ("running_mean", "running_var")
_COUNTERS = ("num_batches_tracked", "num_batches_skipped")
_MOVES_NOTHING = Frozen("batch")


class State(_BatchNorm):
    """nn.BatchNorm's state, and its moves: at once, after a block of `renorm.accumulate`, or merged over workers."""

    affine: bool
    tracking: Tracking
    grouping: Grouping
    weight: nn.Parameter | None  # type: ignore[assignment]  # torch's stubs leave None out
    bias: nn.Parameter | None  # type: ignore[assignment]
    # None where there are none; every use is behind that question
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    num_batches_skipped: Tensor

    blocks: Blocks = ()  # of `renorm.accumulate` and `renorm.freeze`, from the outermost
    sync: Sync | None
    serial: int
    workers: Workers  # that share a batch's statistics, or merge the running ones
    pool: Pool | None = None  # of the model, with which running statistics are merged
    ticket: Tensor  # by which compiled code knows the layer, where it is synchronized

    estimates = False  # statistics are being taken anew, so there is nothing to correct towards

    @property
    def eps(self) -> float:
        """Added to variances.

        Raises:
            RuntimeError: a tool that reads it is about to replace the layer by one that does not do the same.
            ValueError: it is set to less than 0.
        """
        if not torch.compiler.is_compiling():
            refuse_substitution(self, sys._getframe(1))
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        check_eps(value)
        self._eps = value

    @property
    def momentum(self) -> float | None:
        """Weight of a new batch in the running statistics; None for the cumulative average.

        0 leaves the statistics and the step as they are. To set a layer's momentum to None or 1 is how tools take
        statistics anew (torch's update_bn, precise batch norm): the correction rests until it is another number again,
        or what the layer was constructed with. One constructed with None corrects by its cumulative average.
        """
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        constructed_with = self.__dict__.setdefault("_constructed_momentum", value)
        if value != self.__dict__.get("_momentum", value):
            self.estimates = value != constructed_with and (value is None or value == 1)
        self._momentum = value

    @property
    def frozen(self) -> Statistics | None:
        """Whether the running statistics stay as they are in training mode, and what the layer then normalizes by.

        None, the default; "running", as at evaluation; or "batch", as in training. An attribute to set: it outlasts
        `model.train()`, copies and pickling, and is not in the state dict. For a block of code: `renorm.freeze`.

        Raises:
            ValueError: it is set to something else.

        Example:
            >>> import torch, renorm
            >>> layer = renorm.BatchRenorm1d(3)
            >>> layer.frozen = "running"
            >>> y = layer.train()(torch.ones(4, 3))
            >>> layer.num_batches_tracked
            tensor(0)
        """
        return next((block.statistics for block in _lasting(self.blocks)), None)

    @frozen.setter
    def frozen(self, statistics: Statistics | None) -> None:
        if statistics not in (None, *get_args(Statistics)):
            raise ValueError(f"frozen must be None, 'running' or 'batch', got {statistics!r}")
        before = _lasting(self.blocks)
        now = () if statistics is None else (Frozen(statistics, lasts=True),)
        self.blocks = (*now, *(block for block in self.blocks if block not in before))

    @property
    def has_statistics(self) -> bool:
        """Whether there are running statistics, by which evaluation goes, whatever `track_running_stats` says."""
        return self._buffers["running_mean"] is not None

    @contextmanager
    def estimated(self) -> Iterator[None]:
        """Let every batch count, without correction, whatever the settings are; for statistics taken anew."""
        before = self.track_running_stats, self._momentum, self.estimates
        self.track_running_stats, self._momentum, self.estimates = True, 1.0, True
        try:
            yield
        finally:
            self.track_running_stats, self._momentum, self.estimates = before

    def effective_blocks(self) -> Blocks:
        """The blocks that the layer is in, and what its attributes come to: a momentum of 0 moves nothing."""
        if self.track_running_stats and self._momentum != 0:
            return self.blocks
        return (_MOVES_NOTHING, *self.blocks)

    def _register(self, device: torch.device | str | None, dtype: torch.dtype | None, bias: bool) -> None:
        def parameter(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(self.num_features, device=device, dtype=dtype)) if wanted else None

        def statistic() -> Tensor | None:
            if not self.track_running_stats:
                return None
            wide = accumulation_dtype(dtype or torch.get_default_dtype())
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

    def synchronize(self, sync: Sync | None, workers: Workers, pool: Pool | None = None) -> None:
        """Say what this layer has in common with those of other workers; for models, see `renorm.synchronize`.

        Args:
            sync: None, "running" or "batch".
            workers: that share the batch's statistics, or merge the running ones.
            pool: layers that merge the running statistics together; None for those of `sync="running"` that belong
                to none.

        Raises:
            ValueError: `sync` is something else, or does not suit the layer.
        """
        self.check_sync(sync)
        self.serial = next(_serials)
        self.sync, self.workers, self.pool = sync, workers, pool
        if sync is not None:
            self.ticket = ticket_for(self)

    def check_sync(self, sync: object) -> None:
        """Refuse what the layer cannot have in common with others.

        Args:
            sync: as of `synchronize`.

        Raises:
            ValueError: it is something else, or does not suit the layer.
        """
        if sync not in (None, *get_args(Sync)):
            raise ValueError(f"sync must be None, 'running' or 'batch', got {sync!r}")
        if sync == "running" and not self.track_running_stats:
            raise ValueError("sync='running' merges running statistics: track_running_stats must be True")
        if sync == "batch" and self.grouping.examples_per_group is not None:
            raise ValueError(
                "sync='batch' takes one batch over all workers, and examples_per_group cuts it into groups: leave out "
                "one (renorm.synchronize has ranks_per_group for groups of workers; sync='running' keeps groups "
                f"within a worker), got examples_per_group={self.grouping.examples_per_group}"
            )

    def reset_running_stats(self) -> None:
        """Forget every batch: mean 0, variance 1, step 0."""
        if not self.track_running_stats or not self.has_statistics:
            return
        nn.init.zeros_(self.running_mean)  # by torch's functions, which transformers keeps from what it has loaded
        nn.init.ones_(self.running_var)
        nn.init.zeros_(self.num_batches_tracked)
        nn.init.zeros_(self.num_batches_skipped)

    def reset_parameters(self) -> None:
        """Start anew: weight 1, bias 0, and no batch seen."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _state(self) -> RunningState:
        # from the dict, since every attribute of a module that is a buffer costs half a microsecond
        buffers: dict[str, Any] = self._buffers
        steps = buffers["num_batches_tracked"]
        if steps is None:  # taken away by somebody who does not count
            steps = torch.zeros_like(buffers["num_batches_skipped"])
        return RunningState(buffers["running_mean"], buffers["running_var"], steps, buffers["num_batches_skipped"])

    def commit(self, batches: Sequence[Moments]) -> None:
        """Move the running statistics once, by batches together; `renorm.accumulate` and `freeze` have their say.

        Args:
            batches: moments of every channel in every example group of each, (G, C).
        """
        if self._kept_by_a_block(batches):
            return
        pool = self.merging_pool()
        if pool is not None:
            pool.add(self, batches if self._speaks_for_its_group() else [])
            return
        self._move(batches)

    def commit_in_graph(self, y: Tensor, batches: Sequence[Moments]) -> Tensor:
        """The same in compiled code, where running statistics are merged: in the backward pass of y, or at once.

        Args:
            y: output of the layer.
            batches: as of `commit`.

        Returns:
            The output.
        """
        if self._kept_by_a_block(batches):
            return y
        batches = batches if self._speaks_for_its_group() else []
        if y.requires_grad:
            leave(self.ticket, batches)
            return merge_in_backward_of(y, self.ticket)
        sums = self._merging_workers.sum(to_sums([self.summed], [batches], self.running_var.device))
        (moments,), (left_out,) = from_sums(sums, [self.summed], [self.running_var])
        self.commit_merged(moments, left_out)
        return y

    def _kept_by_a_block(self, batches: Sequence[Moments]) -> bool:
        blocks = self.effective_blocks()
        if not counts(blocks):
            return True
        accumulation = innermost_accumulation(blocks)
        if accumulation is not None:
            accumulation.batches.extend(batches)
        return accumulation is not None

    def merging_pool(self) -> Pool | None:
        """With which the running statistics are merged over workers.

        Returns:
            The model's, or that of all layers without one; None if there is nothing to merge.
        """
        return (self.pool or pool_of(self.workers)) if self.merges else None

    @property
    def merges(self) -> bool:
        """Whether the running statistics are merged over workers."""
        return (self.pool is not None or self.sync == "running") and self._merging_workers.number > 1

    @property
    def _merging_workers(self) -> Workers:
        return self.workers if self.pool is None else self.pool.workers

    def _speaks_for_its_group(self) -> bool:
        # The ranks of a ghost group have the same moments, which must count once.
        return self.sync != "batch" or self.workers.rank == 0

    @property
    def summed(self) -> Summed:
        """Which sums over workers the running statistics need."""
        return Summed(self.num_features, self.tracking, self.grouping.channels_per_group, float(self._eps))

    def commit_merged(self, moments: Moments, left_out: Tensor) -> None:
        """Move the running statistics once, by the batches of all workers.

        Args:
            moments: of all workers' batches as one group, (1, C).
            left_out: batches that were not finite, 0-d.
        """
        self.num_batches_skipped.add_(left_out)
        self._move([moments])

    def _move(self, batches: Sequence[Moments]) -> None:
        if not batches:
            return
        state = self._state()
        moments = batches[0] if len(batches) == 1 else _as_groups_of_one(batches, state)
        track(state, moments, Rule(self.tracking, self._momentum), Settings(self.grouping, self._eps))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> State:
        self._settle_count()
        before = {name: self._buffers[name] for name in (*_STATISTICS, *_COUNTERS)}
        counted = self._buffers["num_batches_skipped"]
        super()._apply(fn, recurse)
        if counted is not None and counted.is_meta and not self.num_batches_skipped.is_meta:
            self.num_batches_skipped.zero_()  # to_empty makes memory that no state dict will fill
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is None or after is None:
                continue
            # model.half() spares the statistics, and model.type(...) the counters
            dtype = accumulation_dtype(after.dtype) if buffer.is_floating_point() else buffer.dtype
            if after.dtype != dtype:
                self._buffers[name] = buffer.to(after.device, dtype)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        for name in _STATISTICS:
            loaded = state_dict.get(prefix + name)
            if loaded is not None:  # load_state_dict(assign=True) would take over half precision
                state_dict[prefix + name] = loaded.to(accumulation_dtype(loaded.dtype))
        steps = state_dict.get(prefix + "num_batches_tracked")
        if steps is not None:  # or an average of checkpoints, whose steps are no integer
            state_dict[prefix + "num_batches_tracked"] = steps.to(torch.int64)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._settle_count()

    def _settle_count(self) -> None:
        """No state dict says it, but a layer made without memory, and filled from one, has skipped no batches."""
        mean, skipped = self._buffers["running_mean"], self._buffers["num_batches_skipped"]
        if mean is not None and skipped is not None and skipped.is_meta and not mean.is_meta:
            self._buffers["num_batches_skipped"] = torch.zeros_like(skipped, device=mean.device)

    def register_full_backward_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """As of any module.

        Args:
            hook: as of any module.
            prepend: as of any module.

        Returns:
            A handle, to remove the hook.

        Raises:
            RuntimeError: a tool registers it that takes gradients of single examples, which no batch norm has.
        """
        refuse_single_examples(self, sys._getframe(1))
        return super().register_full_backward_hook(hook, prepend)

    def __prepare_scriptable__(self) -> nn.Module:
        """Asked by torch.jit.script for what to compile in the layer's place.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"torch.jit.script does not take {type(self).__name__}: torch.jit.trace does, or script "
            "renorm.to_batchnorm(model), which says what is lost"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.sync is not None:
            self.ticket = ticket_for(self)
        if self.pool is not None:
            self.pool.register(self)

    def __getstate__(self) -> dict[str, Any]:
        # Copies are outside of the blocks, which would never end for them.
        return self.__dict__ | {"blocks": _lasting(self.blocks)}

    def __setattr__(self, name: str, value: Any) -> None:
        # What a tool makes of a count on the meta device is memory that nobody has written to.
        if name == "num_batches_skipped" and isinstance(value, Tensor) and self.num_batches_skipped.is_meta:
            value = torch.zeros_like(value)
        if name == "num_features" and value != self.__dict__.get(name, value) and self.grouping.channels_per_group > 1:
            raise ValueError(
                f"num_features must stay {self.num_features}, since {self.grouping.channels_per_group} consecutive "
                "channels share their statistics, and without some of them others would: to prune channels, call "
                f"renorm.to_batchnorm(model) before, got {value}"
            )
        super().__setattr__(name, value)


def _lasting(blocks: Blocks) -> tuple[Frozen, ...]:
    return tuple(block for block in blocks if isinstance(block, Frozen) and block.lasts)


def _as_groups_of_one(batches: Sequence[Moments], state: RunningState) -> Moments:
    """Several batches as one, without those that are not finite, which are counted."""
    with torch.no_grad():
        sizes = [len(moments.mean) for moments in batches]
        together = Moments(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        of_batches = torch.stack([groups.all() for groups in together.finite().split(sizes)])
        state.skipped.add_((~of_batches).sum())
        sizes_on_device = torch.tensor(sizes, device=of_batches.device)
        kept = of_batches.repeat_interleave(sizes_on_device, output_size=len(together.mean))[:, None]
        return Moments(*(part.where(kept, 0) for part in together))
