"""Running statistics anew: from data beforehand, `estimate`, or along a stream, `adapt`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..grouping import Grouping
from ..modules import replace_modules, tracking_layers
from ..moments import Moments
from ..norm import Norm
from ..occasions import Accumulation, counts
from ..ops.statistics import moments_of
from ..ops.tracking import update_running
from ..workers.group import Workers
from ..workers.sums import Summed, from_sums, to_sums
from .passes import ModelCall, arguments, batch_statistics, forward, modes, renorm_layers


def estimate(model: nn.Module, loader: Iterable[Any], *, forward: ModelCall = forward) -> nn.Module:
    """Replace the running statistics of a model's norm layers by those of a data set, in place.

    One pass in which the norm layers normalize by their batches, as in training, and everything else is as at
    evaluation (no dropout). Batch renorm's correction rests meanwhile, since it would be toward the statistics that
    are replaced. A layer's moments are merged over all batches by their counts, as its tracking rule says:
    the population's mean, and its variance as training writes it, unbiased for nn.BatchNorm and "var" (fvcore's precise
    batch norm has the biased one), biased for "total"; for "std" the mean over batches of the standard deviation. With
    torch.distributed initialized, over all processes. Weights, modes, momentum and `num_batches_tracked`, so also
    limits, stay as they are; after an error the statistics too.

    For weights that no training has normalized with (averaged, pruned, quantized ones), for data of another
    distribution, and instead of torch.optim.swa_utils.update_bn.

    Args:
        model: with layers of renorm, nn.BatchNorm or its subclasses; may be wrapped in DDP.
        loader: batches, as they should be normalized: of the training's size and mix. See `forward`.
        forward: called with model and batch. By default a batch is the model's input, or begins with it, or is a
            mapping of its arguments.

    Returns:
        The model.

    Raises:
        TypeError: a batch is none of these.
        ValueError: the model has no layer with running statistics, no batch reached one, or one is frozen.

    Warns:
        UserWarning: batches were left out because their moments were not finite, or a layer saw none.

    Source:
        Summers & Dinneen 2020, appendix C, for what it does not do: better statistics of the same data gain nothing.

    Example:
        >>> import renorm
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> data = torch.randn(100, 3)
        >>> model = estimate(model, data.split(20))
        >>> torch.allclose(model[1].running_mean, model[0](data).mean(0), atol=1e-5)
        True
    """
    layers = tracking_layers(model)
    _refuse_frozen(layers)
    summed = [_summed(layer) for layer in layers.values()]
    device = next(iter(layers.values())).running_mean.device
    total = torch.zeros_like(to_sums(summed, [[] for _ in summed], device))
    with _watched(model, list(layers.values())) as seen:
        for batch in loader:
            forward(model, batch)
            total += to_sums(summed, seen, device)
            for batches in seen:
                batches.clear()
    if Workers().number > 1:
        total = Workers().sum(total)
    _write(layers, summed, total)
    return model


@contextmanager
def adapt(model: nn.Module, *, momentum: float = 0.05) -> Iterator[None]:
    """Let running statistics follow a stream at test time, and leave the model as it was at the end.

    A batch is normalized by the statistics of the batches before it, and then moves them: a training step of batch
    renorm without limits, with everything else as at evaluation. So an example's output does not depend on the others
    of its batch, as it does with batch statistics, which a stream sorted by class ruins; it depends on what came
    before. The variance is that of all the stream's examples around the moving mean (`tracking="total"`), so that
    single images do as well as batches. Weights stay as they are; whoever changes them by gradients meanwhile (Tent and
    others) adapts a copy.

    Inside the block neither `model.train()` nor `model.eval()` is to be called, and nothing is compiled. Example
    weights and `frozen` rest, and workers of a distributed evaluation adapt each by itself. The model's own
    `state_dict` holds the statistics as they are then; the block's end restores them, also after an error.

    Args:
        model: trained, with layers of renorm or nn.BatchNorm (not its subclasses, which stay as they are, with a
            warning), whose running statistics are the first to normalize by.
        momentum: weight of a new batch, in (0, 1). 0.05 is for batches of 32, which so remember some 640 examples; in
            proportion for others: 0.0016 for single images, 0.3 for batches of 200.

    Yields:
        Nothing.

    Raises:
        ValueError: `momentum` is out of range, or there is no norm layer with running statistics.

    Source:
        Zhao, Chen & Xia 2023 (DELTA), section 3.1, test-time batch renormalization; Ioffe 2017, algorithm 1.

    Example:
        >>> import renorm
        >>> model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()).eval()
        >>> stream = 2 + torch.randn(100, 16, 3, 8, 8)
        >>> with torch.no_grad(), renorm.adapt(model):
        ...     means = [model(images).mean().abs().item() for images in stream]
        >>> means[-1] < 0.5 < means[0]
        True
        >>> model[0].running_mean
        tensor([0., 0., 0.])
    """
    if not 0 < momentum < 1:
        raise ValueError(f"momentum must be a number between 0 and 1, got {momentum}")
    modules = dict(model.named_modules())
    layers = renorm_layers(model)
    kept = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers.values()]
    try:
        with modes(model, set(layers.values())), ExitStack() as stack:
            for layer in layers.values():
                stack.enter_context(layer.adapting(momentum))
            yield
    finally:
        for layer, buffers in zip(layers.values(), kept, strict=True):
            for name, buffer in buffers.items():
                layer.get_buffer(name).copy_(buffer)
        replace_modules(model, {layer: modules[name] for name, layer in layers.items()})


def _summed(layer: Any) -> Summed:
    return layer.summed if isinstance(layer, Norm) else Summed(layer.num_features, "var", 1, float(layer.eps))


def _refuse_frozen(layers: dict[str, Any]) -> None:
    frozen = [name or "(root)" for name, layer in layers.items() if not counts(getattr(layer, "blocks", ()))]
    if frozen:
        raise ValueError(
            f"model must not be frozen, which keeps the running statistics of {', '.join(frozen)} as they are: call "
            "estimate outside of renorm.freeze, or set layer.frozen = None before"
        )


@contextmanager
def _watched(model: nn.Module, layers: list[Any]) -> Iterator[list[list[Moments]]]:
    """Yield a list for each layer that gets the moments of its batches, by which it normalizes."""
    blocks = {layer: Accumulation() for layer in layers}
    with ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, Norm):
                stack.enter_context(layer.estimated())
            else:
                handle = layer.register_forward_pre_hook(_noting(blocks[layer]), with_kwargs=True)
                stack.callback(handle.remove)
        stack.enter_context(batch_statistics(model, layers, blocks))
        yield [block.batches for block in blocks.values()]


def _noting(block: Accumulation) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, _ = arguments(inputs, named)
        if x.numel() > 0:
            block.batches.append(moments_of(x, None, Grouping()))

    return hook


def _write(layers: dict[str, Any], summed: list[Summed], total: Tensor) -> None:
    found, left_out = from_sums(total, summed, [layer.running_var for layer in layers.values()])
    counts = [float(moments.count) for moments in found]
    unseen = [name or "(root)" for name, count in zip(layers, counts, strict=True) if count == 0]
    if len(unseen) == len(layers):
        raise ValueError(
            "loader must give a batch with finite moments, gave none (NaN in data or weights, or an iterator that is "
            "used up?): running statistics are as they were"
        )
    if unseen:
        warnings.warn(
            f"no finite batch reached {', '.join(unseen)}, whose statistics are as they were: the model does not call "
            "it on these data, or values are not finite before it",
            stacklevel=3,
        )
    if any(int(number) for number in left_out):
        most = max(int(number) for number in left_out)
        warnings.warn(
            f"{most} batches were left out because their moments were not finite: look for NaN and infinity in the "
            "data, and for overflow in half precision",
            stacklevel=3,
        )
    for layer, sums, moments, count in zip(layers.values(), summed, found, counts, strict=True):
        if count == 0:
            continue
        mean, var = update_running(
            layer.running_mean, layer.running_var, moments,
            momentum=1.0, tracking=sums.tracking, channels_per_group=sums.channels_per_group, eps=sums.eps,
        )  # fmt: skip
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
