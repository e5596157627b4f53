"""What the callbacks of training frameworks have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..inference.report import Weighing
from ..limits import Limits
from ..modules import norms


class LimitsAndWeight:
    """What a callback does: limits when a training begins, the example weight when it ends.

    Args:
        limits: from the number of training batches to limits; None to leave them. A momentum that was that of the
            layer's old limits becomes `limits.momentum`.
        weigh: from model and validation data to example weights, as `renorm.weigh`; None for not.

    Attributes:
        weighing: what `weigh` returned; None before.
    """

    def __init__(
        self,
        limits: Callable[[int], Limits] | None = Limits.over,
        weigh: Callable[[nn.Module, Iterable[Any]], Weighing] | None = None,
    ) -> None:
        self.limits, self.weigh = limits, weigh
        self.weighing: Weighing | None = None


def set_limits(model: nn.Module, limits: Callable[[int], Limits], batches: float) -> None:
    """Set the limits of all layers that have some, for a training of a given length, and the momentum with them.

    Args:
        model: with layers of renorm.
        limits: from the number of training batches to limits, as `Limits.over`.
        batches: that the model will be trained on.

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
