"""When running statistics move: once for several batches, not at all, or until a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import norms
from .norm import Norm
from .occasions import Accumulation, Frozen, Statistics
from .recomputation import is_backward
from .transforms import is_left_over


@contextmanager
def accumulate(*models: nn.Module) -> Iterator[None]:
    """Merge the batches of a block, and move the running statistics once, at its end.

    For gradient accumulation, for several forwards of one step, and for a layer called at several time steps. Every
    batch is normalized, and corrected, with the running statistics from before the block; the update is that of one
    batch whose statistics groups are the micro-batches: with `tracking="std"` the running variance is that within
    them, with "var" and "total" how far their means lie apart is in it. `num_batches_tracked` counts the block as
    one, so limits follow optimizer steps. A micro-batch whose moments are not finite is left out and counted in
    `num_batches_skipped`.

    Blocks may be nested: the outermost one moves the statistics. A block that ends in an error moves nothing. Also
    the remedy for a recomputation in the backward pass that is not torch.utils.checkpoint's: wrap forward and
    backward. While the block is open, a state dict holds the statistics from before, and copies know nothing of it.

    Args:
        *models: whose layers wait for the end; other modules in them are not concerned.

    Yields:
        Nothing.

    Raises:
        TypeError: an argument is no module.
        RuntimeError: a batch comes from a transform of torch.func, as vmap, that ended in the block.

    Warns:
        UserWarning: there is no layer of renorm, but torch's batch norm in training mode, which goes on as ever.

    Source:
        Ioffe 2017, section 4.2: statistics over microbatches of 4, one gradient of 32.

    Example:
        >>> import torch, renorm
        >>> layer = renorm.BatchRenorm1d(3)
        >>> with accumulate(layer):
        ...     for micro_batch in torch.randn(8, 4, 3):
        ...         layer(micro_batch).sum().backward()
        >>> layer.num_batches_tracked
        tensor(1)
    """
    pending = {layer: Accumulation() for layer in _tracking_layers(models)}
    with pushed(pending):
        yield
    if any(is_left_over(moments.mean) for accumulation in pending.values() for moments in accumulation.batches):
        raise RuntimeError(
            "accumulate cannot merge batches of a torch.func transform that has ended: let each forward move the "
            "buffers that are handed over, or open the block in the model's own forward"
        )
    for layer, accumulation in pending.items():
        if accumulation.batches or not is_backward():  # a block inside a checkpoint is recomputed, without batches
            layer.commit(accumulation.batches)
    for pool in dict.fromkeys(layer.merging_pool() for layer in pending):
        if pool is not None:
            pool.merge()


@contextmanager
def freeze(*models: nn.Module, statistics: Statistics = "batch") -> Iterator[None]:
    """Leave the running statistics as they are, while the modules stay in training mode.

    For a network that another one's step only passes through: the discriminator while the generator learns, a target
    network, a teacher. Gradients flow as ever.

    Blocks may be nested, in each other and in `accumulate`: what is frozen stays frozen, and the innermost block
    says what to normalize by. The end of a block, also by an error, restores what was.

    Args:
        *models: whose layers are frozen.
        statistics: what layers normalize by: "batch", as in training, with the correction; or "running", as at
            evaluation, example weight included.

    Yields:
        Nothing.

    Raises:
        TypeError: an argument is no module.
        ValueError: `statistics` is neither.

    Warns:
        UserWarning: there is no layer of renorm, but torch's batch norm in training mode, which goes on as ever.

    Example:
        >>> import torch, renorm
        >>> layer = renorm.BatchRenorm1d(3)
        >>> with freeze(layer, statistics="running"):
        ...     y = layer(torch.zeros(4, 3))
        >>> y.abs().max().item(), layer.num_batches_tracked.item()
        (0.0, 0)
    """
    if statistics not in get_args(Statistics):
        raise ValueError(f"statistics must be 'batch' or 'running', got {statistics!r}")
    frozen = Frozen(statistics)
    with pushed(dict.fromkeys(_tracking_layers(models), frozen)):
        yield


class LateFreeze:
    """From a step on, layers train by their running statistics, which stay as they are: batch norm's fair rival.

    A network that ends its training so computes in training what it computes at evaluation, as with batch renorm,
    though only from then on. Steps are the layers' own, `num_batches_tracked`, and stop where the layers freeze. So
    nothing has to be saved: a training that is resumed makes its `LateFreeze` after loading the state dict, and goes on
    as it was, frozen or not. What freezes is `layer.frozen`, which outlasts `model.train()`.

    Args:
        model: with layers of renorm that have running statistics, compiled or wrapped or not.
        at: step from which they are frozen, at least 0; each layer counts its own.

    Raises:
        ValueError: `at` is less than 0, or there is no such layer.

    Source:
        Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 4.3 (population batch in training, "FrozenBN").

    Example:
        >>> import torch, renorm
        >>> model = nn.Sequential(renorm.BatchNorm1d(3))
        >>> freeze = LateFreeze(model, at=2)
        >>> for _ in range(4):
        ...     y = model(torch.randn(8, 3))
        ...     freeze.step()
        False
        True
        True
        True
        >>> model[0].frozen, model[0].num_batches_tracked
        ('running', tensor(2))
    """

    def __init__(self, model: nn.Module, at: int) -> None:
        if at < 0:
            raise ValueError(f"at must be a step of at least 0, got {at}")
        self._at = at
        self._layers = [layer for layer in norms(model).values() if layer.has_statistics]
        if not self._layers:
            raise ValueError(
                "model has no layer of renorm with running statistics to freeze: renorm.convert(model, "
                "renorm.BatchNorm) makes torch's renorm's"
            )
        self._look()

    def step(self) -> bool:
        """Freeze the layers that have come so far; to be called after each step of the training.

        Returns:
            Whether all layers are frozen.
        """
        self._rest -= 1
        if self._layers and self._rest <= 0:
            self._look()
        return not self._layers

    def _look(self) -> None:
        # Not at every step, since to look waits for the device. Where layers count up to 4 times a step, as in a
        # network that is called several times, nothing is missed.
        steps = [int(layer.num_batches_tracked) for layer in self._layers]
        for layer, step in zip(self._layers, steps, strict=True):
            if step >= self._at:
                layer.frozen = "running"
        self._layers = [layer for layer, step in zip(self._layers, steps, strict=True) if step < self._at]
        self._rest = max(1, (self._at - max(steps)) // 4)


def _tracking_layers(models: tuple[nn.Module, ...]) -> list[Norm]:
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"models must be modules, one by one, got {type(model).__name__}")
    layers = dict.fromkeys(layer for model in models for layer in norms(model).values())
    plain = (module for model in models for module in model.modules() if isinstance(module, _BatchNorm))
    if not layers and any(layer.training for layer in plain):
        warnings.warn(
            "accumulate and freeze reach renorm's layers alone: torch's batch norm layers go on as ever; "
            "renorm.convert(model, renorm.BatchNorm) makes them renorm's",
            stacklevel=4,
        )
    return [layer for layer in layers if layer.has_statistics]


@contextmanager
def pushed(blocks: Mapping[Norm, Accumulation | Frozen]) -> Iterator[None]:
    """Put layers into a block each, and take them out at the end.

    Args:
        blocks: by layer.

    Yields:
        Nothing.
    """
    for layer, block in blocks.items():
        layer.blocks = (*layer.blocks, block)
    try:
        yield
    finally:
        for layer, block in blocks.items():
            layer.blocks = tuple(other for other in layer.blocks if other is not block)
