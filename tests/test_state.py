"""State: nn.BatchNorm's checkpoint in both directions, and everything that moves or copies a module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import renorm

FAMILIES: dict[str, dict[str, Any]] = {
    "BatchNorm": {},
    "BatchRenorm": {},
    "GhostBatchNorm": {"examples_per_group": 2},
    "BatchGroupNorm": {"num_groups": 2},
}
SHAPES = {"1d": (6, 4, 5), "2d": (6, 4, 3, 2), "3d": (6, 4, 2, 3, 2)}
every_layer = pytest.mark.parametrize(
    ("family", "dimension"), [(family, dimension) for family in FAMILIES for dimension in SHAPES]
)


def make(family: str, dimension: str, **options: Any) -> renorm.Norm:
    return getattr(renorm, family + dimension)(4, **FAMILIES[family], **options)


def trained(layer: nn.Module, dimension: str) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    for _ in range(3):
        layer(torch.randn(SHAPES[dimension]) * 2 + 1)
    return layer


@every_layer
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"bias": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)
def test_the_state_dict_is_that_of_batch_norm_key_for_key(family: str, dimension: str, options: dict[str, Any]) -> None:
    if not options.get("track_running_stats", True):
        options = options | {"limits": None} if family == "BatchRenorm" else options
    plain = getattr(nn, "BatchNorm" + dimension)(4, **{k: v for k, v in options.items() if k not in ("limits", "bias")})
    if "bias" in options:
        plain.bias = None  # an older torch has no argument for it
    layer = make(family, dimension, **options)
    ours, theirs = layer.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), "a fresh layer starts as nn.BatchNorm does"


@every_layer
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_checkpoints_load_strictly_in_both_directions(family: str, dimension: str, assign: bool) -> None:
    plain = trained(getattr(nn, "BatchNorm" + dimension)(4), dimension)
    layer = make(family, dimension)
    layer.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    back = getattr(nn, "BatchNorm" + dimension)(4)
    back.load_state_dict(trained(layer, dimension).state_dict(), strict=True, assign=assign)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])
    assert layer.num_batches_tracked == 6


@every_layer
def test_a_batch_norm_checkpoint_evaluates_as_it_did(family: str, dimension: str) -> None:
    plain = trained(getattr(nn, "BatchNorm" + dimension)(4), dimension).eval()
    layer = make(family, dimension).eval() if family != "BatchGroupNorm" else renorm.BatchGroupNorm(4, 4).eval()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(SHAPES[dimension])
    assert torch.equal(layer(x), plain(x))


def test_a_wrong_checkpoint_is_refused() -> None:
    layer = renorm.BatchRenorm2d(4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(nn.BatchNorm2d(5).state_dict())
    with pytest.raises(RuntimeError, match="running_var"):
        layer.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "running_var"})
    with pytest.raises(RuntimeError, match="Unexpected"):
        layer.load_state_dict(layer.state_dict() | {"extra": torch.zeros(1)})
    state = layer.state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        layer.load_state_dict(state)


def test_old_checkpoints_without_a_step_load_strictly() -> None:
    state = trained(nn.BatchNorm2d(4), "2d").state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    before = dict(state)
    layer = renorm.BatchRenorm2d(4)
    layer.load_state_dict(state, strict=True)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, state["running_var"])
    assert dict(state).keys() == before.keys(), "the caller's dictionary stays as it was"


def test_old_checkpoints_load_inside_a_model_and_without_metadata() -> None:
    old = {f"0.{name}": tensor for name, tensor in nn.BatchNorm1d(4).state_dict().items() if "num" not in name}
    model = nn.Sequential(renorm.BatchRenorm1d(4))
    model.load_state_dict(old, strict=True)
    assert model[0].num_batches_tracked == 0


def test_an_old_checkpoint_loads_into_a_layer_on_meta() -> None:
    old = {name: tensor for name, tensor in nn.BatchNorm1d(4).state_dict().items() if "num" not in name}
    layer = renorm.BatchRenorm1d(4, device="meta")
    layer.load_state_dict(old, strict=True, assign=True)
    assert layer.num_batches_tracked.device.type == "cpu"


def test_a_checkpoint_in_the_middle_of_the_ramp_goes_on_from_its_step() -> None:
    limits = renorm.Limits(r_max=2.0, d_max=1.0, start=2, r_end=9, d_end=6)
    batches = [torch.randn(8, 4) * (1 + i) + i for i in range(10)]
    straight = renorm.BatchRenorm1d(4, limits=limits)
    for batch in batches[:5]:
        straight(batch)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = renorm.BatchRenorm1d(4, limits=limits)
    resumed.load_state_dict(torch.load(file))
    assert resumed.num_batches_tracked == 5
    for batch in batches[5:]:
        assert torch.equal(straight(batch), resumed(batch))
    assert torch.equal(straight.running_var, resumed.running_var)


def _pickled(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def _saved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "torch.save"])
def test_copies_are_the_same_layer_and_apart(family: str, dimension: str, copied: Any) -> None:
    layer = trained(make(family, dimension, example_weight=0.2, act="silu"), dimension)
    other = copied(layer)
    x = torch.randn(SHAPES[dimension])
    assert repr(other) == repr(layer)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.running_var, layer.running_var)
    assert torch.equal(other.eval()(x), layer.eval()(x))
    other.running_mean.zero_()
    assert not torch.equal(other.running_mean, layer.running_mean)


def test_averaged_models_keep_their_statistics() -> None:
    model = nn.Sequential(renorm.BatchRenorm1d(4))
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    model(torch.randn(8, 4) + 3)
    averaged.update_parameters(model)
    assert averaged.module[0].num_batches_tracked == 1
    assert torch.equal(averaged.module[0].running_mean, model[0].running_mean)


def _to_float(model: nn.Module) -> nn.Module:
    return model.type(torch.FloatTensor)


def _loaded_as_an_average(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: (value + value) / 2 for name, value in model.state_dict().items()}, assign=True)
    return model


def _averaged_in_place(model: nn.Module) -> nn.Module:
    for buffer in model.buffers():
        buffer.data = buffer.data * 0.9 + buffer.data * 0.1
    return model


@pytest.mark.parametrize("change", [_to_float, _loaded_as_an_average, _averaged_in_place])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_steps_are_counted_in_whatever_dtype_others_leave_them(
    change: Callable[[nn.Module], nn.Module], momentum: float | None
) -> None:
    x = torch.randn(8, 4) + 3
    limits = renorm.Limits(start=0, r_end=300, d_end=300)
    model, expected = (nn.Sequential(renorm.BatchRenorm1d(4, momentum=momentum, limits=limits)) for _ in range(2))
    for each in (model, expected):
        for _ in range(100):
            each(x)
    change(model)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected(x))
    assert int(model[0].num_batches_tracked.round()) == 103  # type: ignore[operator, union-attr]
    torch.testing.assert_close(model[0].running_mean, expected[0].running_mean)


@pytest.mark.parametrize("change", [_to_float, _loaded_as_an_average])
def test_steps_stay_integers_where_a_layer_has_its_say(change: Callable[[nn.Module], nn.Module]) -> None:
    layer = change(nn.Sequential(renorm.BatchRenorm1d(4)))[0]
    assert layer.num_batches_tracked.dtype == layer.num_batches_skipped.dtype == torch.int64


def test_the_counter_of_skipped_batches_is_not_saved() -> None:
    layer = renorm.BatchRenorm1d(2)
    layer(torch.full((4, 2), torch.nan))
    assert layer.num_batches_skipped == 1
    assert "num_batches_skipped" not in layer.state_dict()
    assert "num_batches_skipped" in dict(layer.named_buffers())


def test_resetting_forgets_batches_and_parameters() -> None:
    layer = renorm.BatchRenorm1d(3)
    nn.init.normal_(layer.weight)
    layer(torch.randn(8, 3))
    layer(torch.full((8, 3), torch.inf))
    weight = layer.weight.clone()
    layer.reset_running_stats()
    assert torch.equal(layer.weight, weight)
    assert layer.num_batches_tracked == layer.num_batches_skipped == 0
    layer.reset_parameters()
    for name, tensor in nn.BatchNorm1d(3).state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor)


def test_resetting_without_statistics_is_harmless() -> None:
    layer = renorm.BatchNorm1d(3, track_running_stats=False, affine=False)
    layer.reset_running_stats()
    layer.reset_parameters()
    assert list(layer.state_dict()) == []


def test_affine_false_registers_no_parameters() -> None:
    assert list(renorm.BatchRenorm1d(3, affine=False).parameters()) == []
    assert [name for name, _ in renorm.BatchRenorm1d(3, bias=False).named_parameters()] == ["weight"]


@every_layer
def test_arguments_go_by_position_as_in_batch_norm(family: str, dimension: str) -> None:
    group = tuple(FAMILIES[family].values())
    layer = getattr(renorm, family + dimension)(4, *group, 1e-3, 0.2, False, True, None, torch.float64)
    assert (layer.eps, layer.momentum, layer.affine, layer.track_running_stats) == (1e-3, 0.2, False, True)
    assert layer.running_var.dtype == torch.float64


def test_defaults_are_those_of_the_design() -> None:
    layers = {
        renorm.BatchNorm2d(4): (0.1, "var", None, None, 1),
        renorm.BatchRenorm2d(4): (0.01, "std", renorm.Limits(), None, 1),
        renorm.GhostBatchNorm2d(4, 2): (0.01, "total", None, 2, 1),
        renorm.BatchGroupNorm2d(4, 2): (0.01, "total", None, 2, 2),
    }
    for layer, expected in layers.items():
        settings = (
            layer.momentum, layer.tracking, layer.limits, layer.examples_per_group, layer.channels_per_group,
        )  # fmt: skip
        assert settings == expected
        assert (layer.eps, layer.affine, layer.example_weight, layer.act) == (1e-5, True, 0.0, None)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_layers_are_made_on_the_device_that_is_asked_for(device: str) -> None:
    layer = renorm.BatchRenorm2d(4, device=device, dtype=torch.float64)
    for tensor in (*layer.parameters(), *layer.buffers()):
        assert tensor.device.type == device
    assert layer.weight.dtype == layer.running_mean.dtype == torch.float64
    with torch.device(device):
        assert renorm.BatchRenorm2d(4).running_var.device.type == device


def test_a_layer_on_meta_materializes() -> None:
    layer = renorm.BatchRenorm2d(4, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(3, 4, 2, 2)).isfinite().all()


def test_a_layer_moves_to_meta() -> None:
    layer = renorm.BatchRenorm2d(4).to("meta")
    y = layer(torch.randn(3, 4, 2, 2, device="meta"))
    assert y.shape == (3, 4, 2, 2)
    assert all(tensor.is_meta for tensor in (y, *layer.parameters(), *layer.buffers()))


def test_the_repr_says_what_is_set() -> None:
    layer = renorm.Norm(
        8, affine=False, examples_per_group=4, channels_per_group=2, tracking="total", example_weight=0.25,
        limits=renorm.Limits(2.0, 1.0, 100, 300, 200), act="relu",
    )  # fmt: skip
    for part in (
        "8", "affine=False", "examples_per_group=4", "channels_per_group=2", "'total'", "example_weight=0.25",
        "r_max=2.0", "act='relu'", "plain batch norm until step 100",
    ):  # fmt: skip
        assert part in repr(layer)
    assert "plain" not in repr(renorm.BatchRenorm2d(8, limits=renorm.Limits.constant()))
