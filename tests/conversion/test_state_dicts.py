"""Checkpoints of other implementations: ours evaluate as those layers do that wrote them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import renorm
from renorm.conversion.state_dicts import translate_state_dict

C = 6
RENORMS = {2: renorm.BatchRenorm1d, 3: renorm.BatchRenorm1d, 4: renorm.BatchRenorm2d, 5: renorm.BatchRenorm3d}


class Other(nn.Module):
    """A layer that keeps its numbers under other names, and perhaps in another shape, and evaluates by them."""

    NAMES = ("weight", "bias", "running_mean", "running_std")
    COUNTER: str | None = "num_batches_tracked"
    eps = 1e-3
    is_std = True

    def __init__(self, ndim: int = 4, keeps_dimensions: bool = False) -> None:
        super().__init__()
        shape = (1, C, *[1] * (ndim - 2)) if keeps_dimensions else (C,)
        scale, shift, mean, spread = self.NAMES
        self.register_parameter(scale, nn.Parameter(torch.randn(shape)))
        self.register_parameter(shift, nn.Parameter(torch.randn(shape)))
        self.register_buffer(mean, torch.randn(shape))
        self.register_buffer(spread, torch.rand(shape) + 0.3)
        if self.COUNTER is not None:
            self.register_buffer(self.COUNTER, torch.tensor(4321))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, C, *[1] * (x.ndim - 2))
        scale, shift, mean, spread = (getattr(self, name).reshape(shape) for name in self.NAMES)
        return (x - mean) / (spread if self.is_std else (spread + self.eps).sqrt()) * scale + shift


class Ludvb(Other):
    """ludvb/batchrenorm: running_std has eps inside."""


class Avalanche(Other):
    """Those made from mf1024's: four dimensions, the count of batches under a name of its own, and the limits."""

    NAMES = ("gamma", "beta", "running_avg_mean", "running_avg_std")
    COUNTER = "num_tracked_batch"

    def __init__(self, ndim: int = 4) -> None:
        super().__init__(ndim, keeps_dimensions=True)
        self.register_buffer("r_max", torch.tensor(1.5))
        self.register_buffer("d_max", torch.tensor(0.5))


class AvalancheOfVariances(Avalanche):
    """The same, with variances."""

    NAMES = ("gamma", "beta", "running_avg_mean", "running_avg_var")
    is_std = False


class TorchRL(Other):
    """torchrl: nn.BatchNorm's names."""

    NAMES = ("weight", "bias", "running_mean", "running_var")
    is_std = False


class StableBaselines(Other):
    """sb3-contrib's CrossQ."""

    NAMES = ("scale", "bias", "ra_mean", "ra_var")
    COUNTER = "steps"
    is_std = False


class Flax(Other):
    """sbx's CrossQ, parameters and statistics of a layer in one."""

    NAMES = ("scale", "bias", "mean", "var")
    COUNTER = "steps"
    is_std = False


class Chainer(Other):
    """Chainer's link."""

    NAMES = ("gamma", "beta", "avg_mean", "avg_var")
    COUNTER = None
    is_std = False


OTHERS = [Ludvb, Avalanche, AvalancheOfVariances, TorchRL, StableBaselines, Flax, Chainer]
WITH_STD = [Ludvb, Avalanche]


def keras(renormalizes: bool, eps: float, layer: str = "conv1/bn") -> dict[str, np.ndarray]:
    """Weights of Keras's layer as it leaves them after training: by name, as arrays."""
    draw = np.random.default_rng(0)
    std = draw.uniform(0.2, 2.0, C).astype(np.float32)
    weights = {
        "gamma": draw.normal(size=C), "beta": draw.normal(size=C), "moving_mean": draw.normal(size=C),
        "moving_variance": np.maximum(std * std - eps, 0),
    }  # fmt: skip
    if renormalizes:
        weights |= {"moving_stddev": std, "renorm_mean": draw.normal(size=C), "renorm_stddev": np.ones(C)}
    return {f"{layer}/{name}:0": value.astype(np.float32) for name, value in weights.items()}


def evaluate_keras(weights: dict[str, np.ndarray], x: Tensor, eps: float) -> Tensor:
    """As Keras does, by moving_variance and in its layout, in float64."""
    gamma, beta, mean, var = (
        next(value for key, value in weights.items() if f"/{name}:" in key).astype(np.float64)
        for name in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    last = x.movedim(1, -1).double().numpy()
    return torch.from_numpy((last - mean) / np.sqrt(var + eps) * gamma + beta).movedim(-1, 1)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
@pytest.mark.parametrize("target", [renorm.BatchRenorm2d, renorm.BatchNorm2d, nn.BatchNorm2d])
def test_a_layer_evaluates_as_the_one_that_wrote_the_checkpoint(other: type[Other], target: type[nn.Module]) -> None:
    theirs = other().eval()
    ours = target(C, eps=theirs.eps).eval()
    ours.load_state_dict(translate_state_dict(theirs.state_dict(), ours))
    x = torch.randn(5, C, 3, 4)
    close(ours(x), theirs(x))


@pytest.mark.parametrize("ndim", RENORMS)
def test_every_number_of_dimensions_loads(ndim: int) -> None:
    theirs, ours = Avalanche(ndim).eval(), RENORMS[ndim](C).eval()
    ours.load_state_dict(translate_state_dict(theirs.state_dict(), ours))
    x = torch.randn(5, C, *range(2, ndim))
    close(ours(x), theirs(x))


@pytest.mark.parametrize("other", WITH_STD, ids=lambda other: other.__name__)
@pytest.mark.parametrize("eps", [1e-7, 1e-5, 1e-3, 1e-2])
def test_standard_deviations_load_with_any_eps(other: type[Other], eps: float) -> None:
    theirs, ours = other().eval(), renorm.BatchRenorm2d(C, eps=eps).eval()
    ours.load_state_dict(translate_state_dict(theirs.state_dict(), ours))
    x = torch.randn(5, C, 3, 4)
    close(ours(x), theirs(x))


@pytest.mark.parametrize("renormalizes", [True, False])
def test_keras_layers_evaluate_alike(renormalizes: bool) -> None:
    weights = keras(renormalizes, 1e-3)
    ours = renorm.BatchRenorm2d(C, eps=1e-3).eval()
    ours.load_state_dict(translate_state_dict(weights, ours, names={"": "conv1/bn"}))
    x = torch.randn(5, C, 3, 4)
    close(ours(x), evaluate_keras(weights, x, 1e-3))


def test_keras_moving_stddev_becomes_the_running_variance() -> None:
    weights = keras(True, 1e-3)
    ours = renorm.BatchRenorm2d(C, eps=1e-3)
    translated = translate_state_dict(weights, ours, names={"": "conv1/bn"})
    expected = torch.from_numpy(weights["conv1/bn/moving_stddev:0"]) ** 2 - 1e-3
    torch.testing.assert_close(translated["running_var"], expected, rtol=1e-6, atol=0)


def test_a_dead_channel_of_keras_loads_as_variance_zero() -> None:
    weights = keras(True, 1e-3)
    weights["conv1/bn/moving_stddev:0"][0] = np.sqrt(np.float32(1e-3)) * np.float32(1 - 3e-6)  # as rounding leaves it
    ours = renorm.BatchRenorm2d(C, eps=1e-3)
    translated = translate_state_dict(weights, ours, names={"": "conv1/bn"})
    assert translated["running_var"][0] == 0
    assert (translated["running_var"][1:] > 0).all()


@pytest.mark.parametrize(("absent", "own", "value"), [("gamma", "weight", 1.0), ("beta", "bias", 0.0)])
def test_without_scale_or_shift_there_is_none(absent: str, own: str, value: float) -> None:
    weights = keras(True, 1e-3, "bn")
    del weights[f"bn/{absent}:0"]
    ours = renorm.BatchRenorm2d(C, eps=1e-3)
    nn.init.normal_(getattr(ours, own))
    ours.load_state_dict(translate_state_dict(weights, ours, names={"": "bn"}))
    assert (getattr(ours, own) == value).all()


def test_a_scale_that_was_never_trained_is_dropped_for_a_layer_without_one() -> None:
    theirs, ours = Ludvb().eval(), renorm.BatchRenorm2d(C, affine=False).eval()
    nn.init.ones_(theirs.get_parameter("weight"))
    nn.init.zeros_(theirs.get_parameter("bias"))
    ours.load_state_dict(translate_state_dict(theirs.state_dict(), ours))
    x = torch.randn(5, C, 3, 4)
    close(ours(x), theirs(x))


class Network(nn.Module):
    """Convolutions, and norm layers of one kind or another."""

    def __init__(self, norms: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(C, C, 1), norm, nn.ReLU()) for norm in norms])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_the_rest_of_a_model_loads_along() -> None:
    theirs = Network([Ludvb(), Ludvb(), nn.BatchNorm2d(C)]).eval()
    ours = Network([renorm.BatchRenorm2d(C), nn.BatchNorm2d(C), renorm.BatchNorm2d(C)]).eval()
    ours.load_state_dict(translate_state_dict(theirs.state_dict(), ours))
    x = torch.randn(5, C, 3, 4)
    close(ours(x), theirs(x))


def test_layers_may_have_other_names_in_the_checkpoint() -> None:
    weights = keras(True, 1e-3, "stage1/batch_normalization") | keras(True, 1e-3, "stage1/batch_normalization_1")
    ours = Network([renorm.BatchRenorm2d(C, eps=1e-3) for _ in range(2)])
    names = {"blocks.0.1": "stage1/batch_normalization", "blocks.1.1": "stage1.batch_normalization_1"}
    translated = translate_state_dict(weights, ours, names=names)
    assert set(translated) == {key for key in ours.state_dict() if key.startswith(tuple(f"{name}." for name in names))}
    missing = ours.load_state_dict(translated, strict=False).missing_keys
    assert set(missing) == set(ours.state_dict()) - set(translated)


def test_a_shared_layer_loads_under_all_its_names() -> None:
    norm = renorm.BatchRenorm2d(C)
    ours, theirs = nn.Sequential(norm, norm), Ludvb()
    ours.load_state_dict(translate_state_dict(nn.Sequential(theirs, theirs).state_dict(), ours))
    assert torch.equal(norm.running_mean, theirs.get_buffer("running_mean"))


def test_own_checkpoints_are_as_they_were() -> None:
    ours = Network([renorm.BatchRenorm2d(C), renorm.BatchGroupNorm2d(C, num_groups=2), nn.BatchNorm2d(C)])
    state = ours.state_dict()
    translated = translate_state_dict(state, ours)
    assert set(translated) == set(state)
    assert all(torch.equal(translated[key], state[key]) for key in state)


# --- where the limits start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [Ludvb, Avalanche, StableBaselines], ids=lambda other: other.__name__)
@pytest.mark.parametrize("steps", [None, 7])
def test_the_checkpoint_says_how_many_batches_it_saw(other: type[Other], steps: int | None) -> None:
    ours = renorm.BatchRenorm2d(C)
    ours.load_state_dict(translate_state_dict(other().state_dict(), ours, steps=steps))
    assert ours.num_batches_tracked == 4321


@pytest.mark.parametrize(("steps", "expected"), [(None, 99), (0, 0), (50_000, 50_000)])
def test_otherwise_the_caller_does(steps: int | None, expected: int) -> None:
    ours = renorm.BatchRenorm2d(C)
    ours.num_batches_tracked.fill_(99)
    ours.load_state_dict(translate_state_dict(Chainer().state_dict(), ours, steps=steps))
    assert ours.num_batches_tracked == expected


def test_the_state_is_a_copy_where_it_was_the_models() -> None:
    ours = renorm.BatchRenorm2d(C)
    translated = translate_state_dict(Chainer().state_dict(), ours)
    ours.num_batches_tracked.add_(1)
    assert translated["num_batches_tracked"] == 0


# --- what is refused --------------------------------------------------------------------------------------------


def refused(state: dict[str, Any], message: str, layer: nn.Module | None = None, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        translate_state_dict(state, layer or renorm.BatchRenorm2d(C), **options)


def test_statistics_outside_of_the_state_dict_are_missed() -> None:
    state = Avalanche().state_dict()
    del state["running_avg_mean"], state["running_avg_std"]
    refused(state, r"no running_mean and no running_var for \(root\).*add them to state")


def test_two_names_for_one_number_are_refused() -> None:
    state = Ludvb().state_dict() | {"running_var": torch.ones(C)}
    refused(state, "both 'running_var' and 'running_std'")
    refused(Ludvb().state_dict() | {"gamma": torch.ones(C)}, "both 'weight' and 'gamma'")


def test_an_unknown_name_is_refused() -> None:
    refused(Ludvb().state_dict() | {"running_median": torch.ones(C)}, "'running_median' for .*known are weight, gamma")


@pytest.mark.parametrize("shape", [(C + 1,), (2, 3), (), (1, 1)])
def test_a_shape_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    refused(Ludvb().state_dict() | {"running_std": torch.ones(shape)}, f"num_features={C} of .*got shape")


@pytest.mark.parametrize("own", ["weight", "bias"])
def test_a_scale_or_shift_that_has_no_place_is_refused(own: str) -> None:
    state = Ludvb().state_dict() | {"weight": torch.ones(C), "bias": torch.zeros(C)}
    refused(
        state | {own: torch.full((C,), 2.0)}, f"'{own}' is not .* has no {own}", renorm.BatchRenorm2d(C, affine=False)
    )


def test_a_standard_deviation_below_the_layers_eps_is_refused_and_the_advice_works() -> None:
    theirs = Ludvb().eval()
    theirs.get_buffer("running_std")[0] = 1.08e-3
    theirs.get_buffer("running_mean").zero_()  # else x - mean is mostly rounding
    state = theirs.state_dict()
    with pytest.raises(ValueError, match=r"deviation of 0.00108.*make it with eps=") as refusal:
        translate_state_dict(state, renorm.BatchRenorm2d(C, eps=1e-5))
    ours = renorm.BatchRenorm2d(C, eps=float(str(refusal.value).split("eps=")[-1].split()[0])).eval()
    ours.load_state_dict(translate_state_dict(state, ours))
    x = 1e-3 * torch.randn(5, C, 3, 4)
    close(ours(x), theirs(x))


@pytest.mark.parametrize("std", [0.0, -1.0, torch.nan])
def test_a_standard_deviation_that_is_none_is_refused(std: float) -> None:
    refused(Ludvb().state_dict() | {"running_std": torch.full((C,), std)}, "'running_std' must be above 0")


@pytest.mark.parametrize(("names", "message"), [({"bn": "bn"}, "model's"), ({"": "other"}, "checkpoint's")])
def test_names_of_nothing_are_refused(names: dict[str, str], message: str) -> None:
    refused(keras(True, 1e-3, "bn"), f"names has .* the {message} ", names=names)


@pytest.mark.parametrize(("key", "value"), [("optimizer", {"lr": 0.1}), ("note", "trained"), ("best", None)])
def test_more_than_a_state_dict_is_refused_and_named(key: str, value: Any) -> None:
    refused(Ludvb().state_dict() | {f"{key}.more": value}, f"for '{key}.more': hand over the state dict alone")


def test_negative_steps_are_refused() -> None:
    refused(Ludvb().state_dict(), "steps must be at least 0, got -1", steps=-1)
