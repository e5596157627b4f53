"""What the callbacks of training frameworks have in common."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ..blocks import accumulate as accumulating
from ..inference.report import Weighing
from ..inference.weigh import rehearse, weigh
from ..limits import Limits
from ..modules import norms


class LimitsAndWeight:
    """What a callback does: limits when a training begins, the example weight when it ends.

    Args:
        limits: from the number of training batches, or with `accumulate` of optimizer steps, to limits; None to leave
            them. A momentum that was that of the layer's old limits becomes `limits.momentum`.
        weigh: from model and validation data to example weights, as `renorm.weigh`; None for not.
        accumulate: whether the micro-batches of an optimizer step move the running statistics once, together.

    Attributes:
        weighing: what `weigh` returned; None before.
    """

    def __init__(
        self,
        limits: Callable[[int], Limits] | None = Limits.over,
        weigh: Callable[[nn.Module, Iterable[Any]], Weighing] | None = None,
        accumulate: bool = False,
    ) -> None:
        self.limits, self.weigh, self.accumulate = limits, weigh, accumulate
        self.weighing: Weighing | None = None
        self._block: AbstractContextManager[None] | None = None

    def prepare(self, model: nn.Module, steps: float, micro_batches: int) -> None:
        """Set the limits, and see that micro-batches can be accumulated.

        Args:
            model: to be trained.
            steps: of the optimizer.
            micro_batches: of a step.

        Raises:
            ValueError: there are no limits to set, no layer to accumulate, or the length of the training is not known.
        """
        self.drop_block()  # which an interrupted training has left
        if self.accumulate and not norms(model):
            raise ValueError(
                "accumulate reaches renorm's layers alone, and the model has none: renorm.convert(model, "
                "renorm.BatchNorm) makes torch's renorm's, or leave accumulate out"
            )
        if self.limits is not None:
            set_limits(model, self.limits, steps if self.accumulate else steps * micro_batches)

    def open_block(self, model: nn.Module) -> None:
        """Begin to merge micro-batches, unless that has begun.

        Args:
            model: whose layers wait.
        """
        if self.accumulate and self._block is None:
            self._block = accumulating(model)
            self._block.__enter__()

    def close_block(self) -> None:
        """Move the running statistics, if micro-batches are being merged."""
        if self._block is not None:
            block, self._block = self._block, None
            block.__exit__(None, None, None)

    def drop_block(self) -> None:
        """Forget the micro-batches that no optimizer step will follow."""
        if self._block is not None:
            block, self._block = self._block, None
            unfinished = InterruptedError("no optimizer step")
            block.__exit__(InterruptedError, unfinished, None)

    @property
    def calls_renorm(self) -> bool:
        """Whether `weigh` is `renorm.weigh`, with options or without."""
        return getattr(self.weigh, "func", self.weigh) is weigh

    def try_weighing(self, model: nn.Module, loader: Iterable[Any]) -> None:
        """Find out before a training whether the model can be weighed after it. A function of the user's is not tried.

        Args:
            model: as it will be trained; it stays as it is, and so do random numbers.
            loader: of the data to weigh on, or of others in the same form; its first batch is taken.

        Raises:
            ValueError: it cannot.
        """
        if not self.calls_renorm:
            return
        try:
            with random_numbers_kept(model):
                rehearse(model, loader, **getattr(self.weigh, "keywords", {}))
        except Exception as error:
            raise ValueError(
                f"weigh would fail after the training, as it does on one batch now: {error} (give weigh="
                "partial(renorm.weigh, metric=..., forward=...) what suits the model's outputs and the data's targets, "
                "or weigh=None)"
            ) from error

    def weigh_at_the_end(self, model: nn.Module, loader: Iterable[Any]) -> None:
        """Choose the example weight. What fails here must not cost the trained model, which is to be saved yet.

        Args:
            model: trained.
            loader: to weigh on.

        Warns:
            UserWarning: that failed.
        """
        if self.weigh is None:
            return
        try:
            self.weighing = self.weigh(model, loader)
        except Exception as error:
            warnings.warn(
                f"weigh failed, and the trained model's example weights are as they were: {error!r}; call "
                "renorm.weigh(model, loader, ...) on it",
                stacklevel=3,
            )


def set_limits(model: nn.Module, limits: Callable[[int], Limits], batches: float) -> None:
    """Set the limits of all layers that have some, for a training of a given length, and the momentum with them.

    Args:
        model: with layers of renorm.
        limits: from the number of moves of the running statistics to limits, as `Limits.over`.
        batches: that the model will be trained on, or optimizer steps where micro-batches are accumulated.

    Raises:
        ValueError: no layer has limits, or the length of the training is not known.
    """
    layers = [layer for layer in norms(model).values() if layer.limits is not None]
    if not layers:
        raise ValueError("no layer of the model has limits: convert it to renorm.BatchRenorm, or give limits=None")
    if not 1 <= batches < float("inf"):
        raise ValueError(f"limits go by the number of training batches, which is not known, got {batches}: set a "
                         "number of epochs or steps, or give limits=None")  # fmt: skip
    chosen = limits(int(batches))
    for layer in layers:
        assert layer.limits is not None
        if layer.momentum == layer.limits.momentum:  # not one that the user chose
            layer.momentum = chosen.momentum
        layer.limits = chosen


def require_one_process(processes: int) -> None:
    """Refuse to choose an example weight on a share of the validation data.

    Args:
        processes: of the training.

    Raises:
        ValueError: there are several.
    """
    if processes > 1:
        raise ValueError(
            f"weigh passes over all validation data in one process, got {processes}: give weigh=None, and call "
            "renorm.weigh(model, loader) in one process after the training"
        )


@contextmanager
def random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Let a block leave the random numbers of torch, NumPy and Python as they were.

    Args:
        model: on whose devices torch has some, too.

    Yields:
        Nothing.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    numpy: Any = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        if numpy:
            numpy.random.set_state(of_numpy)
