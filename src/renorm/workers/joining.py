"""Workers that run out of batches, in torch's Join; apart, because its import takes a second."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from .pool import Pool


class JoinablePool(Joinable):
    """A pool as torch's `Join` sees it: a worker without a batch takes part in the collectives with nothing.

    Args:
        pool: of the layers of a model.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool = pool
        pool.announce = self._announce

    def _announce(self) -> None:
        Join.notify_join_context(self)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What a worker does that has run out.

        Args:
            **kwargs: of `Join`, not used.

        Returns:
            The hook.
        """
        return _TakePart(self._pool)

    @property
    def join_device(self) -> torch.device:
        """Where `Join` counts."""
        return self._pool.device

    @property
    def join_process_group(self) -> Any:
        """The workers."""
        return self._pool.workers.process_group


class _TakePart(JoinHook):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def main_hook(self) -> None:
        self._pool.take_part_with_nothing()
