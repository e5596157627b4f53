"""What cannot be normalized is refused: by the argument's name, the value given and what is accepted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import renorm
from renorm import Limits, functional

MEAN, VAR = torch.zeros(4), torch.ones(4)


@pytest.mark.parametrize(
    ("layer", "shape", "accepted"),
    [
        ("1d", (4,), "2d or 3d"),
        ("1d", (6, 4, 3, 3), "2d or 3d"),
        ("2d", (4, 3, 3), "4d"),
        ("2d", (6, 4), "4d"),
        ("2d", (6, 4, 2, 3, 3), "4d"),
        ("3d", (4, 2, 3, 3), "5d"),
        ("3d", (1, 6, 4, 2, 3, 3), "5d"),
        ("", (4,), "2d or 3d or 4d or 5d"),
        ("", (1, 6, 4, 2, 3, 3), "2d or 3d or 4d or 5d"),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("family", ["BatchNorm", "BatchRenorm"])
def test_input_of_another_rank(family: str, layer: str, shape: tuple[int, ...], accepted: str, training: bool) -> None:
    module = getattr(renorm, family + layer)(4).train(training)
    with pytest.raises(ValueError, match=f"{family}{layer} takes {accepted} input.*{_literally(shape)}"):
        module(torch.randn(shape))


def _literally(shape: tuple[int, ...]) -> str:
    return str(tuple(shape)).replace("(", r"\(").replace(")", r"\)")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no parameters"])
def test_another_number_of_channels(training: bool, affine: bool) -> None:
    layer = renorm.BatchNorm2d(4, affine=affine, track_running_stats=training).train(training)
    with pytest.raises(ValueError, match=r"x .*num_features=4.*\(2, 5, 3, 3\)"):
        layer(torch.randn(2, 5, 3, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.int32], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_integer_input(dtype: torch.dtype, training: bool) -> None:
    x = torch.ones(2, 4, 3, dtype=dtype)
    with pytest.raises(TypeError, match=f"x must be a floating-point tensor.*{dtype}"):
        renorm.BatchNorm1d(4).train(training)(x)
    with pytest.raises(TypeError, match=f"x must be a floating-point tensor.*{dtype}"):
        functional.batch_norm(x)
    with pytest.raises(TypeError, match=f"x must be a floating-point tensor.*{dtype}"):
        functional.weighted_batch_norm(x, MEAN, VAR, example_weight=0.5)


def test_complex_input() -> None:
    with pytest.raises(TypeError, match=r"floating-point.*complex64"):
        renorm.BatchNorm1d(4)(torch.ones(2, 4, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 4), {}),
        ((1, 4, 1, 1), {}),
        ((6, 4), {"examples_per_group": 1}),
        ((6, 4, 1), {"examples_per_group": 1}),
        ((1, 4), {"examples_per_group": 3}),
    ],
)
def test_a_single_element_per_group_without_limits(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    layer = renorm.Norm(4, **options)
    with pytest.raises(ValueError, match=rf"more than one element per.*group.*{_literally(shape)}.*limits"):
        layer(torch.randn(shape))
    assert layer.num_batches_tracked == 0
    assert layer.eval()(torch.randn(shape)).shape == shape


def test_a_single_element_per_group_also_without_running_statistics() -> None:
    layer = renorm.BatchNorm1d(4, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="more than one element"):
        layer(torch.randn(1, 4))


@pytest.mark.parametrize("shape", [(2, 4), (1, 4, 2), (1, 4, 1, 2), (1, 4, 2, 1, 1)], ids=str)
def test_two_elements_per_group_are_enough(shape: tuple[int, ...]) -> None:
    assert renorm.BatchNorm(4)(torch.randn(shape)).isfinite().all()
    assert renorm.Norm(4, examples_per_group=1, channels_per_group=2)(torch.randn(1, 4)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels_per_group": 3}, r"channels_per_group must divide the 4 channels, got 3"),
        ({"channels_per_group": 8}, r"channels_per_group must divide the 4 channels, got 8"),
        ({"channels_per_group": 0}, "channels_per_group must be at least 1, got 0"),
        ({"channels_per_group": -2}, "channels_per_group must be at least 1, got -2"),
        ({"examples_per_group": 0}, "examples_per_group must be at least 1, got 0"),
        ({"examples_per_group": -1}, "examples_per_group must be at least 1, got -1"),
        ({"example_weight": -0.1}, r"example_weight must be in \[0, 1\], got -0.1"),
        ({"example_weight": 1.5}, r"example_weight must be in \[0, 1\], got 1.5"),
        ({"example_weight": math.nan}, r"example_weight must be in \[0, 1\], got nan"),
        ({"tracking": "mean"}, "tracking must be one of 'std', 'var', 'total', got 'mean'"),
        ({"act": "tanh"}, "act must be None or one of .*'relu'.*'silu'.*got 'tanh'"),
        ({"track_running_stats": False, "limits": Limits()}, "limits.*track_running_stats must be True"),
        ({"track_running_stats": False, "example_weight": 0.5}, "example_weight.*track_running_stats must be True"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        renorm.Norm(4, **options)


def test_an_activation_for_a_layer_that_has_one() -> None:
    with pytest.raises(ValueError, match=r"act must be None.*act='relu'.*got 'silu'"):
        renorm.BatchNorm1d(4, act="relu")(torch.randn(3, 4), act="silu")


@pytest.mark.parametrize("name", ["examples_per_group", "channels_per_group"])
@pytest.mark.parametrize("value", [2.0, "2", True])
def test_sizes_that_are_no_integers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer.*{value}"):
        renorm.Norm(4, **{name: value})


@pytest.mark.parametrize("num_groups", [3, 0, -1, 8])
def test_channel_groups_that_do_not_divide(num_groups: int) -> None:
    with pytest.raises(ValueError, match=f"num_groups must divide num_features=4, got {num_groups}"):
        renorm.BatchGroupNorm2d(4, num_groups)


def test_batch_renorm_without_running_statistics() -> None:
    with pytest.raises(ValueError, match="limits"):
        renorm.BatchRenorm2d(4, track_running_stats=False)


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_an_example_weight_set_later(value: float) -> None:
    layer = renorm.BatchNorm2d(4, example_weight=0.5)
    with pytest.raises(ValueError, match=rf"example_weight must be in \[0, 1\], got {value}"):
        layer.example_weight = value
    assert layer.example_weight == 0.5
    with pytest.raises(ValueError, match="track_running_stats"):
        renorm.BatchNorm2d(4, track_running_stats=False).example_weight = 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r_max": 0.9}, "r_max must be at least 1.*got 0.9"),
        ({"r_max": -1.0}, "r_max must be at least 1.*got -1.0"),
        ({"r_max": math.nan}, "r_max must be at least 1.*got nan"),
        ({"d_max": -0.1}, "d_max must be at least 0.*got -0.1"),
        ({"d_max": math.nan}, "d_max must be at least 0.*got nan"),
        ({"start": -1}, "start must be .*at least 0.*got -1"),
        ({"start": 10, "r_end": 9, "d_end": 20}, "r_end must not come before start=10, got 9"),
        ({"start": 10, "r_end": 20, "d_end": 9}, "d_end must not come before start=10, got 9"),
    ],
)
def test_limits_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**arguments)


@pytest.mark.parametrize("total_steps", [0, -5])
def test_a_training_without_steps(total_steps: int) -> None:
    with pytest.raises(ValueError, match=f"total_steps must be at least 1, got {total_steps}"):
        Limits.over(total_steps)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"r_max": 0.5, "d_max": 1.0}, "r_max must be at least 1.*got 0.5"),
        ({"r_max": 2.0, "d_max": -1.0}, "d_max must be at least 0.*got -1.0"),
    ],
)
def test_limits_of_the_function_out_of_range(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.batch_renorm(torch.randn(3, 4), MEAN, VAR, **limits)


@pytest.mark.parametrize("shape", [(6, 4, 5), (5,), (6, 3), (2, 3, 5), (6, 1, 5, 5), (5, 6)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_mask_of_another_shape(shape: tuple[int, ...], training: bool, alpha: float) -> None:
    layer = renorm.BatchNorm2d(4, example_weight=alpha).train(training)
    x = torch.randn(6, 4, 5, 3)
    with pytest.raises(ValueError, match=rf"mask must have shape \(6, 5, 3\).*{_literally(shape)}"):
        layer(x, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_mask_that_is_not_boolean(dtype: torch.dtype, training: bool) -> None:
    with pytest.raises(TypeError, match=f"mask must be a boolean tensor.*{dtype}"):
        renorm.BatchNorm1d(4).train(training)(torch.randn(6, 4, 5), torch.ones(6, 5, dtype=dtype))


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1), (1, 4, 5), (6, 5)], ids=str)
def test_a_residual_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"residual must have the shape of x, \(6, 4, 5\), got {_literally(shape)}"):
        renorm.BatchNorm1d(4)(torch.randn(6, 4, 5), residual=torch.randn(shape))


X = torch.randn(6, 4, 5)


WRONG_CALLS: dict[str, tuple[Any, str]] = {
    "batch_norm: rank": (lambda: functional.batch_norm(torch.randn(4)), r"x must have shape \(N, C, ...\), got \(4,\)"),
    "batch_norm: weight": (lambda: functional.batch_norm(X, torch.ones(3)), r"weight.*\(3,\).*got \(6, 4, 5\)"),
    "batch_norm: bias": (lambda: functional.batch_norm(X, None, torch.ones(4, 1)), r"bias.*\(4, 1\)"),
    "batch_norm: channels": (
        lambda: functional.batch_norm(X, channels_per_group=3),
        "channels_per_group must divide the 4 channels, got 3",
    ),
    "batch_norm: examples": (
        lambda: functional.batch_norm(X, examples_per_group=0),
        "examples_per_group must be at least 1, got 0",
    ),
    "batch_norm: single element": (lambda: functional.batch_norm(torch.randn(1, 4)), "more than one element"),
    "batch_renorm: rank": (
        lambda: functional.batch_renorm(torch.randn(4), MEAN, VAR, r_max=1, d_max=0),
        r"x must have shape \(N, C, ...\), got \(4,\)",
    ),
    "batch_renorm: running_mean": (
        lambda: functional.batch_renorm(X, torch.zeros(3), VAR, r_max=1, d_max=0),
        r"running_mean.*\(3,\)",
    ),
    "batch_renorm: running_var": (
        lambda: functional.batch_renorm(X, MEAN, torch.ones(3), r_max=1, d_max=0),
        r"running_var.*\(3,\)",
    ),
    "renormalize: rank": (
        lambda: functional.renormalize(torch.randn(4), torch.ones(1, 4), torch.ones(1, 4)),
        r"x must have shape \(N, C, ...\), got \(4,\)",
    ),
    "renormalize: r": (
        lambda: functional.renormalize(X, torch.ones(4), torch.ones(1, 4)),
        r"r must .*\(1, 4\), got \(4,\)",
    ),
    "renormalize: d": (
        lambda: functional.renormalize(X, torch.ones(1, 4), torch.ones(2, 4)),
        r"d must .*\(1, 4\), got \(2, 4\)",
    ),
    "weighted_batch_norm: rank": (
        lambda: functional.weighted_batch_norm(torch.randn(4), MEAN, VAR),
        r"x must have shape \(N, C, ...\), got \(4,\)",
    ),
    "weighted_batch_norm: running_var": (
        lambda: functional.weighted_batch_norm(X, MEAN, torch.ones(5)),
        r"running_var.*\(5,\)",
    ),
    "weighted_batch_norm: example_weight": (
        lambda: functional.weighted_batch_norm(X, MEAN, VAR, example_weight=2),
        r"example_weight must be in \[0, 1\], got 2",
    ),
    "weighted_batch_norm: channels": (
        lambda: functional.weighted_batch_norm(X, MEAN, VAR, channels_per_group=3),
        "channels_per_group must divide the 4 channels, got 3",
    ),
    "weighted_batch_norm: no channels": (
        lambda: functional.weighted_batch_norm(X, MEAN, VAR, channels_per_group=0),
        "channels_per_group must be at least 1, got 0",
    ),
    "update_running: tracking": (
        lambda: functional.update_running(MEAN, VAR, functional.batch_norm(X)[1], momentum=0.1, tracking="mean"),
        "tracking must be one of 'std', 'var', 'total', got 'mean'",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_functions_refuse_what_the_layers_refuse(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_batch_changes_nothing() -> None:
    layer = renorm.BatchRenorm2d(4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for bad in (torch.randn(4, 3, 3), torch.randn(2, 5, 3, 3), torch.ones(2, 4, 3, 3, dtype=torch.long)):
        with pytest.raises((ValueError, TypeError)):
            layer(bad)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("mode", ["training", "frozen", "evaluation", "evaluation without gradients"])
@pytest.mark.parametrize("moved", ["mask", "residual", "weight", "running_mean", "layer"])
def test_tensors_of_several_devices(moved: str, mode: str) -> None:
    layer, x = renorm.BatchRenorm1d(4, act="relu"), torch.randn(3, 4, 5)
    given = {"mask": torch.ones(3, 5, dtype=torch.bool), "residual": torch.randn(3, 4, 5)}
    if moved in given:
        given[moved] = given[moved].to("meta")
    elif moved == "layer":
        layer.to("meta")
    else:
        setattr(layer, moved, torch.nn.Parameter(layer.weight.to("meta")) if moved == "weight" else MEAN.to("meta"))  # type: ignore[union-attr]
    layer.train(mode in ("training", "frozen"))
    layer.frozen = "batch" if mode == "frozen" else None
    with (
        torch.set_grad_enabled(mode != "evaluation without gradients"),
        pytest.raises(ValueError, match=r"must be on x's device, cpu, got a tensor of shape \(.*\) on meta"),
    ):
        layer(x, **given)
