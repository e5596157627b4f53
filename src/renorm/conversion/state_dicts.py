"""State dicts: those of other people's batch renormalization under the names of ours, and several as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..modules import tracks
from ..moments import accumulation_dtype

__all__ = ["merge", "translate_state_dict"]

What = Literal["all", "statistics", "shared"]

_NAMES = {
    "weight": ("weight", "gamma", "scale"),
    "bias": ("bias", "beta"),
    "running_mean": ("running_mean", "moving_mean", "running_avg_mean", "avg_mean", "ra_mean", "mean"),
    "running_var": ("running_var", "moving_variance", "running_avg_var", "avg_var", "ra_var", "var"),
    "running_std": ("running_std", "moving_stddev", "running_avg_std"),
    "num_batches_tracked": ("num_batches_tracked", "num_tracked_batch", "steps"),
}
_MEANINGS = {name: meaning for meaning, names in _NAMES.items() for name in names}
# What only training uses: Keras's second set of statistics, and limits that were reached.
_PASSED_OVER = {"renorm_mean", "renorm_stddev", "renorm_mean_weight", "renorm_stddev_weight", "r_max", "d_max", "N"}
_NEUTRAL = {"weight": 1.0, "bias": 0.0}
_ROUNDING = 1e-4  # of a moving average in float32, relative


def translate_state_dict(
    state: Mapping[str, Any],
    model: nn.Module,
    *,
    names: Mapping[str, str] | None = None,
    steps: int | None = None,
) -> dict[str, Tensor]:
    """Rename and convert the norm layers of another implementation's checkpoint, for `model.load_state_dict`.

    Reads Keras's `BatchNormalization`, with and without `renorm=True`, and the PyTorch, Flax and Chainer
    implementations of batch renormalization (docs/other-checkpoints.md lists them and their names). Running standard
    deviations become variances such that evaluation is the same, whatever the layer's eps: running_var = running_std^2
    - eps. Where the checkpoint has variances, the layer must have the eps it was trained with.

    Args:
        state: the checkpoint: tensors or arrays by name, with "." or "/" between the parts. For a single layer the
            names are those of its numbers alone, "gamma" for example.
        model: what will load the result, with norm layers of renorm or torch; not changed.
        names: norm layers that the checkpoint calls otherwise: name there by name in the model ("" for a model that is
            a layer itself).
        steps: batches that layers have seen, (), where the checkpoint does not say; None for the model's own
            num_batches_tracked. Batch renorm's limits start there.

    Returns:
        The state dict. A layer's scale and shift are 1 and 0 where the checkpoint has none; what belongs to no norm
        layer of the model is as it was.

    Raises:
        ValueError: something is no tensor or array; a layer has names that are not known, two for the same number, or
            none for its running statistics; a shape does not fit; a scale or shift is there that the model's layer
            does not have; a standard deviation is 0 or too small for the layer's eps; `names` has a layer that model
            or checkpoint do not have.

    Source:
        Ioffe 2017, algorithm 1, for moving averages of the standard deviation.

    Example:
        >>> import renorm
        >>> layer = renorm.BatchRenorm2d(2, eps=1e-3)
        >>> keras = {"bn/gamma:0": [1.0, 2.0], "bn/moving_mean:0": [0.0, 3.0], "bn/moving_stddev:0": [1.0, 2.0]}
        >>> layer.load_state_dict(translate_state_dict(keras, layer, names={"": "bn"}, steps=10_000))
        <All keys matched successfully>
        >>> layer.running_var
        tensor([0.9990, 3.9990])
    """
    if steps is not None and steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if tracks(module)}
    keys: dict[str, list[str]] = {}  # of every module in the checkpoint
    for key in state:
        keys.setdefault(_split(key)[0], []).append(key)
    modules = _modules(layers, keys, names or {})
    taken = set(modules.values())
    result = {key: _tensor(value, key) for key, value in state.items() if _split(key)[0] not in taken}
    for name, module in modules.items():
        for own, value in _translate(state, keys[module], name, layers[name], steps).items():
            result[f"{name}.{own}" if name else own] = value
    return result


def merge(
    state_dicts: Sequence[Mapping[str, Tensor]], counts: Sequence[float] | None = None, what: What = "all"
) -> dict[str, Tensor]:
    """One state dict of several: weights averaged, running statistics as those of all data together.

    For federated rounds and for averages of checkpoints. An average of running variances leaves out how far the means
    lie apart, which is the larger part where every client has classes of its own; the law of total variance has both.

    Args:
        state_dicts: of models of one architecture, of our layers or nn.BatchNorm; not changed.
        counts: share of each in the result, the number of its examples, say, at least 0; None for equal shares.
        what: "all"; "statistics" for the running statistics alone, where everyone keeps the weights; or "shared" for
            everything but the norm layers, where these stay each client's own (FedBN). What is left out stays as it is
            with `load_state_dict(..., strict=False)`.

    Returns:
        A state dict, in the dtypes and on the devices of the first. Numbers that are no floats are the largest of all:
        steps go on where the furthest is.

    Raises:
        ValueError: there are none, they have other names or shapes than each other, counts do not fit, or `what` is
            something else.

    Source:
        Law of total variance; Li et al. 2021, "FedBN", for layers that stay local.

    Example:
        >>> first, second = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
        >>> for layer, batch in ((first, [[0.0], [2.0]]), (second, [[10.0], [12.0]])):
        ...     layer.momentum = None
        ...     _ = layer(torch.tensor(batch))
        >>> merge([first.state_dict(), second.state_dict()])["running_var"]
        tensor([27.])
    """
    if what not in get_args(What):
        raise ValueError(f"what must be 'all', 'statistics' or 'shared', got {what!r}")
    shares = _shares(len(state_dicts), counts)
    first = state_dicts[0]
    for i, other in enumerate(state_dicts):
        apart = sorted(first.keys() ^ other.keys()) or [key for key in first if first[key].shape != other[key].shape]
        if apart:
            raise ValueError(f"state_dicts must have the same names and shapes, got another {apart[0]!r} in number {i}")
    layers = {_split(key)[0] for key in first if _split(key)[1] == "running_var"}
    result = {}
    for key, value in first.items():
        layer, name = _split(key)
        is_statistic = layer in layers and name in ("running_mean", "running_var", "num_batches_tracked")
        if (what == "statistics" and not is_statistic) or (what == "shared" and layer in layers):
            continue
        values = [other[key] for other in state_dicts]
        if not value.is_floating_point():
            result[key] = torch.stack([each.to(value.device) for each in values]).amax(0)
            continue
        merged = _weighted(values, shares)
        if layer in layers and name == "running_var":
            means = [other[f"{layer}.running_mean" if layer else "running_mean"] for other in state_dicts]
            mean = _weighted(means, shares)
            merged = merged + _weighted([(each.double().to(mean.device) - mean).square() for each in means], shares)
        result[key] = merged.to(value.dtype)
    return result


def _shares(number: int, counts: Sequence[float] | None) -> list[float]:
    if number == 0:
        raise ValueError("state_dicts must have at least one, got none")
    if counts is None:
        return [1 / number] * number
    if len(counts) != number or min(counts) < 0 or not 0 < sum(counts) < float("inf"):
        raise ValueError(
            f"counts must be one number of at least 0 for each of the {number} state dicts, and not all 0, got {counts}"
        )
    return [count / sum(counts) for count in counts]


def _weighted(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        if share > 0:  # nothing times a share of 0, which may not be finite
            total += share * tensor.to(total.device, torch.float64)
    return total


def _split(key: str) -> tuple[str, str]:
    """Module and name of a number: ("conv1.bn", "gamma") of "conv1/bn/gamma:0"."""
    module, _, leaf = _dotted(key).rpartition(".")
    return module, leaf


def _dotted(key: str) -> str:
    return re.sub(r":\d+$", "", key).replace("/", ".")


def _modules(layers: Iterable[str], keys: Mapping[str, list[str]], names: Mapping[str, str]) -> dict[str, str]:
    """Names in the checkpoint of the layers that it has."""
    for name, module in names.items():
        if name not in layers:
            raise ValueError(f"names has {name!r}, but the model's norm layers are {', '.join(map(repr, layers))}")
        if _dotted(module) not in keys:
            raise ValueError(f"names has {module!r}, but the checkpoint's modules are {', '.join(map(repr, keys))}")
    modules = {name: _dotted(names.get(name, name)) for name in layers}
    return {name: module for name, module in modules.items() if module in keys}


def _translate(
    state: Mapping[str, Any], keys: Iterable[str], name: str, layer: Any, steps: int | None
) -> dict[str, Tensor]:
    name = name or "(root)"
    found = _by_meaning(keys, name)
    missing = [_NAMES[m][0] for m in ("running_mean", "running_var") if m not in found]
    if "running_std" in found:
        missing = [m for m in missing if m != "running_var"]
    if missing:
        raise ValueError(
            f"the checkpoint has no {' and no '.join(missing)} for {name}, under no name that is known. "
            "Implementations that keep them in plain attributes lose them in a checkpoint: add them to state"
        )
    values = {
        meaning: _tensor(state[key], key) if meaning == "num_batches_tracked" else _flat(state[key], key, name, layer)
        for meaning, key in found.items()
    }
    result = _affine(values, found, name, layer)
    result["running_mean"] = values["running_mean"]
    std = values.get("running_std")
    result["running_var"] = values["running_var"] if std is None else _variance(std, found["running_std"], name, layer)
    own = layer.num_batches_tracked if steps is None else torch.tensor(steps, device="cpu")
    result["num_batches_tracked"] = values.get("num_batches_tracked", own).detach().clone().reshape(()).long()
    return result


def _by_meaning(keys: Iterable[str], name: str) -> dict[str, str]:
    """What in the checkpoint is which number of a layer."""
    found: dict[str, str] = {}
    for key in keys:
        leaf = _split(key)[1]
        if leaf in _PASSED_OVER:
            continue
        meaning = _MEANINGS.get(leaf)
        if meaning is None:
            raise ValueError(f"the checkpoint has {key!r} for {name}; known are {', '.join(_MEANINGS)}")
        if meaning in found:
            raise ValueError(f"the checkpoint has both {found[meaning]!r} and {key!r} for {name}: leave out one")
        found[meaning] = key
    std = found.get("running_std")
    if std is not None and "running_var" in found and _split(std)[1] != "moving_stddev":  # Keras keeps both
        raise ValueError(f"the checkpoint has both {found['running_var']!r} and {std!r} for {name}: leave out one")
    return found


def _flat(value: Any, key: str, name: str, layer: Any) -> Tensor:
    tensor = _tensor(value, key)
    if tensor.numel() != layer.num_features or layer.num_features not in (1, *tensor.shape):
        raise ValueError(
            f"{key!r} must have one number for each of the num_features={layer.num_features} of {name}, "
            f"got shape {tuple(tensor.shape)}"
        )
    return tensor.reshape(-1)


def _affine(values: Mapping[str, Tensor], found: Mapping[str, str], name: str, layer: Any) -> dict[str, Tensor]:
    result = {}
    for own, neutral in _NEUTRAL.items():
        parameter, value = getattr(layer, own), values.get(own)
        if parameter is not None:
            result[own] = torch.full_like(parameter.detach(), neutral) if value is None else value
        elif value is not None and not bool((value == neutral).all()):
            raise ValueError(f"{found[own]!r} is not {neutral:g} throughout, but {name} has no {own}")
    return result


def _variance(std: Tensor, key: str, name: str, layer: Any) -> Tensor:
    if not bool((std > 0).all()):
        raise ValueError(f"{key!r} must be above 0, got {std.min().item():.3g}")
    square = std.double().square()
    least = square.min().item()
    if least < layer.eps * (1 - _ROUNDING):
        raise ValueError(
            f"{key!r} has a standard deviation of {least**0.5:.3g}, but {name} divides by sqrt(eps) or more, with "
            f"eps={layer.eps:g}: make it with eps={0.9 * least:.2g} or less"
        )
    var: Tensor = (square - layer.eps).clamp(min=0)
    return var.to(accumulation_dtype(std.dtype))


def _tensor(value: Any, key: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    try:
        return torch.tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"state must have tensors or arrays alone, got {type(value).__name__} for {key!r}: hand over the state "
            "dict alone, where the checkpoint has more"
        ) from error
