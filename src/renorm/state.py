"""Parameters and running statistics: what a layer keeps, and how batches move it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from .grouping import Grouping
from .moments import Moments, accumulation_dtype
from .occasions import Blocks, counts, innermost_accumulation
from .ops.dispatch import track
from .ops.problem import RunningState, Settings
from .ops.tracking import Rule, Tracking
from .workers.group import Workers
from .workers.pool import Pool, pool_of
from .workers.sums import Summed

Sync = Literal["running", "batch"]
_serials = count()
_STATISTICS = ("running_mean", "running_var")


class State(nn.Module):
    """nn.BatchNorm's state, and its moves: at once, after a block of `renorm.accumulate`, or merged over workers."""

    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    tracking: Tracking
    grouping: Grouping
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    # None without track_running_stats; every use is behind that question
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    num_batches_skipped: Tensor

    blocks: Blocks = ()  # of `renorm.accumulate` and `renorm.freeze`, from the outermost
    sync: Sync | None
    serial: int
    workers: Workers  # that share a batch's statistics, or merge the running ones
    pool: Pool | None = None  # of the model, with which running statistics are merged

    _version = 2  # nn.BatchNorm's, whose checkpoints had no num_batches_tracked before

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

    def _state(self) -> RunningState:
        # from the dict, since every attribute of a module that is a buffer costs half a microsecond
        buffers: dict[str, Any] = self._buffers
        return RunningState(
            buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"],
            buffers["num_batches_skipped"],
        )  # fmt: skip

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
        pool = self.merging_pool()
        if pool is not None:
            pool.add(self, batches if self._speaks_for_its_group() else [])
            return
        self._move(batches)

    def merging_pool(self) -> Pool | None:
        """With which the running statistics are merged over workers.

        Returns:
            The model's, or that of all layers without one; None if there is nothing to merge.
        """
        if self.pool is None and self.sync != "running":
            return None
        pool = self.pool or pool_of(self.workers)
        return pool if pool.workers.number > 1 else None

    def _speaks_for_its_group(self) -> bool:
        # The ranks of a ghost group have the same moments, which must count once.
        return self.sync != "batch" or self.workers.rank == 0

    @property
    def summed(self) -> Summed:
        """Which sums over workers the running statistics need."""
        return Summed(self.num_features, self.tracking, self.grouping.channels_per_group, float(self.eps))

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
        track(state, moments, Rule(self.tracking, self.momentum), Settings(self.grouping, self.eps))

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
                own = self.num_batches_tracked
                count = torch.zeros((), dtype=torch.long) if own.is_meta else own
                state_dict.setdefault(prefix + "num_batches_tracked", count)
            for name in _STATISTICS:
                loaded = state_dict.get(prefix + name)
                if loaded is not None:  # load_state_dict(assign=True) would take over half precision
                    state_dict[prefix + name] = loaded.to(accumulation_dtype(loaded.dtype))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.pool is not None:
            self.pool.register(self)

    def __getstate__(self) -> dict[str, Any]:
        # Copies are outside of the blocks, which would never end for them.
        return {name: value for name, value in self.__dict__.items() if name != "blocks"}


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
