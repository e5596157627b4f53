"""renorm.recipe, and convert by a recipe: what travels, what stays, what is refused."""

from __future__ import annotations

import copy
import io
import json
import math
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

import renorm
from renorm import ConversionReport, Limits, convert, recipe, to_batchnorm
from renorm.fusion.model import FusedForward

LIMITS = Limits.over(1_000, math.inf, 4.0)
OPTIONS: dict[str, Any] = {
    "momentum": 0.05, "limits": LIMITS, "examples_per_group": 2, "tracking": "var", "example_weight": 0.25,
    "eps": 1e-3, "act": "relu", "sync": "running",
}  # fmt: skip
SETTINGS = (*OPTIONS, "channels_per_group", "frozen")
TARGETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "BatchNorm": (renorm.BatchNorm, OPTIONS | {"channels_per_group": 2}),
    "BatchRenorm": (renorm.BatchRenorm, OPTIONS),
    "GhostBatchNorm": (renorm.GhostBatchNorm, OPTIONS),
    "BatchGroupNorm": (renorm.BatchGroupNorm, OPTIONS | {"num_groups": 4}),
    "Norm": (renorm.Norm, OPTIONS),
}


def network(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(8), nn.Flatten(), nn.Linear(8 * 9, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
    )


def settings(layer: nn.Module) -> dict[str, Any]:
    return {"class": type(layer)} | {name: getattr(layer, name) for name in SETTINGS}


def by_json(model: nn.Module) -> Any:
    return json.loads(json.dumps(recipe(model), allow_nan=False))


def silent(report: ConversionReport) -> None:
    """Where a test does not look at the report."""


# --- what travels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "options"), TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_fresh_model_gets_every_setting(norm: type[nn.Module], to: Any, options: dict[str, Any]) -> None:
    model = convert(network(norm), to, **options)
    model[4].frozen = "running"
    again = convert(network(norm), by_json(model))
    for index in (1, 4):
        assert settings(again[index]) == settings(model[index])
    x = torch.randn(4, 3, 5, 5)
    again.load_state_dict(model.state_dict())
    for training in (True, False):
        assert torch.equal(again.train(training)(x), model.train(training)(x))
    assert again[1].num_batches_tracked == 1
    assert again[4].num_batches_tracked == 0


def test_group_norm_becomes_what_it_was() -> None:
    def fresh() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8))

    model = convert(fresh(), renorm.BatchGroupNorm, examples_per_group=1, num_groups=2)
    again = convert(fresh(), by_json(model))
    assert type(again[1]) is renorm.BatchGroupNorm
    assert again[1].num_groups == 2
    assert again[1].examples_per_group == 1


def test_a_layer_of_any_dimension_replaces_one_of_a_single_dimension() -> None:
    model = convert(network(nn.SyncBatchNorm), renorm.BatchRenorm)
    again = convert(network(), recipe(model))
    assert type(again[1]) is renorm.BatchRenorm
    assert again[1].sync == "batch"


class GBN(nn.Module):
    """TabNet's ghost batch norm, in its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.virtual_batch_size = nn.BatchNorm1d(4), 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.bn(part) for part in x.split(self.virtual_batch_size)])


def test_a_ghost_batch_norm_of_another_library_is_replaced_as_it_was() -> None:
    converted = convert(nn.Sequential(nn.Linear(4, 4), GBN()), renorm.GhostBatchNorm, report=silent)
    fresh = convert(nn.Sequential(nn.Linear(4, 4), GBN()), by_json(converted), report=silent)
    assert type(fresh[1]) is renorm.GhostBatchNorm1d
    assert settings(fresh[1]) == settings(converted[1])


def test_timm_s_layer_keeps_its_activation() -> None:
    timm_layers = pytest.importorskip("timm.layers")

    def fresh() -> nn.Module:
        return nn.Sequential(timm_layers.BatchNormAct2d(8, act_layer=nn.SiLU))

    model = convert(fresh(), renorm.BatchRenorm, limits=LIMITS, fuse=True)
    again = convert(fresh(), by_json(model))
    assert type(again[0]) is type(model[0])
    assert isinstance(again[0].act, nn.SiLU)
    assert again[0].fused
    assert again[0].limits == LIMITS
    assert recipe(again) == recipe(model)
    set_again = convert(renorm.convert(fresh(), renorm.BatchRenorm), recipe(model))
    assert isinstance(set_again[0].act, nn.SiLU)
    assert recipe(set_again) == recipe(model)


def test_layers_that_are_there_get_the_settings_and_stay_the_same_objects() -> None:
    model = nn.Sequential(
        renorm.GhostBatchNorm1d(4, 2, **{k: v for k, v in OPTIONS.items() if k != "examples_per_group"})
    )
    again = nn.Sequential(layer := renorm.GhostBatchNorm1d(4, 8))
    assert convert(again, by_json(model))[0] is layer
    assert settings(layer) == settings(model[0])


def test_the_cumulative_average_corrects_as_one_that_was_constructed() -> None:
    again = nn.Sequential(renorm.BatchRenorm1d(4))
    convert(again, recipe(nn.Sequential(renorm.BatchRenorm1d(4, momentum=None))))
    assert again[0].momentum is None
    assert not again[0].estimates


def test_recurrent_layers_get_the_settings() -> None:
    model, again = renorm.BatchRenormLSTM(3, 4, limits=LIMITS), renorm.BatchRenormLSTM(3, 4)
    assert recipe(convert(again, by_json(model))) == recipe(model) != recipe(renorm.BatchRenormLSTM(3, 4))


def test_a_class_of_the_user_s_gets_the_settings_where_it_is() -> None:
    class Own(renorm.BatchRenorm1d):
        pass

    model = nn.Sequential(Own(4, example_weight=0.5))
    assert convert(nn.Sequential(Own(4)), recipe(model))[0].example_weight == 0.5
    with pytest.raises(ValueError, match="cannot convert '0' to 'Own', which is no class of renorm"):
        convert(nn.Sequential(nn.BatchNorm1d(4)), recipe(model))


def test_calls_that_were_fused_are_fused_and_no_others() -> None:
    def fresh() -> nn.ModuleList:
        return nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(2))

    model = fresh()
    convert(model[0], renorm.BatchRenorm, fuse=True)
    convert(model[1], renorm.BatchRenorm)
    reports: list[ConversionReport] = []
    again = convert(fresh(), by_json(model), report=reports.append)
    assert [isinstance(part, FusedForward) for part in again] == [True, False]
    assert [row.name for row in reports[0].fused] == ["0.1"]
    assert [row.name for row in reports[0].replaced] == ["0.1", "1.1"]


def test_torch_saves_it_beside_the_state_dict() -> None:
    model = convert(network(), renorm.BatchRenorm, **OPTIONS)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "renorm": recipe(model)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = convert(network(), saved["renorm"])
    again.load_state_dict(saved["model"])
    assert recipe(again) == recipe(model)


def test_names_are_those_of_the_model_without_its_compiler() -> None:
    model = convert(network(), renorm.BatchRenorm)
    parts = nn.ModuleDict({"net": torch.compile(model, backend="eager")})
    assert list(recipe(parts)["layers"]) == ["net.1", "net.4"]
    model[1].example_weight = 0.5
    again = convert(nn.ModuleDict({"net": network()}), recipe(parts))
    assert again["net"][1].example_weight == 0.5
    convert(parts, recipe(nn.ModuleDict({"net": model})))  # settings alone may change


# --- what stays -------------------------------------------------------------------------------------------------


def test_parameters_buffers_and_what_the_recipe_does_not_name_stay() -> None:
    named = recipe(nn.Sequential(nn.Identity(), renorm.BatchRenorm2d(8)))
    model = network()
    other, state = model[4], dict(model.named_parameters()) | dict(model.named_buffers())
    assert convert(model, named, report=silent) is model
    assert type(model[1]) is renorm.BatchRenorm2d
    assert model[4] is other
    after = dict(model.named_parameters()) | {name: model.get_buffer(name) for name in dict(network().named_buffers())}
    assert {name: id(value) for name, value in after.items()} == {name: id(value) for name, value in state.items()}


def test_the_root_is_replaced_and_a_shared_layer_stays_one() -> None:
    assert type(convert(nn.BatchNorm1d(4), recipe(renorm.BatchRenorm1d(4)))) is renorm.BatchRenorm1d
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleList([shared, shared])
    convert(model, recipe(nn.ModuleList([renorm.BatchRenorm1d(4)] * 2)))
    assert type(model[0]) is renorm.BatchRenorm1d
    assert model[0] is model[1]


def test_a_process_group_stays_with_the_layer_and_is_asked_for_elsewhere(tmp_path: Any) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        model = renorm.synchronize(nn.Sequential(renorm.BatchRenorm1d(4)), "batch", process_group=group)
        workers = model[0].workers
        convert(model, by_json(model))
        assert model[0].workers is workers
        again = convert(nn.Sequential(nn.BatchNorm1d(4)), by_json(model))
        with pytest.raises(RuntimeError, match=r"call renorm.synchronize\(model, ...\) again"):
            again(torch.randn(4, 4))
    finally:
        dist.destroy_process_group()
    again(torch.randn(4, 4))  # one process needs no group


def test_layers_that_merge_statistics_have_one_collective() -> None:
    model = renorm.synchronize(convert(network(), renorm.BatchRenorm), "running")
    again = convert(network(), recipe(model))
    assert again[1].pool is again[4].pool is not None


# --- what is refused, with the model as it was --------------------------------------------------------------------


def refused(model: nn.Module, given: Any, error: type[Exception], match: str, **options: Any) -> None:
    before, settings = list(model.modules()), recipe(model)
    with pytest.raises(error, match=match):
        convert(model, given, **options)
    assert list(model.modules()) == before
    assert recipe(model) == settings


@pytest.mark.parametrize(
    ("options", "names"),
    [({"where": "1"}, "where"), ({"steps": 0, "fuse": True}, "steps, fuse"), ({"momentum": 0.1}, "momentum")],
)
def test_options_together_with_a_recipe(options: dict[str, Any], names: str) -> None:
    refused(network(), recipe(network()), TypeError, rf"convert\(model, recipe\) without {names}$", **options)


def test_another_version_and_other_keys() -> None:
    good = recipe(convert(network(), renorm.BatchRenorm))
    refused(network(), {}, ValueError, "of version 1, as .* got version None")
    refused(network(), good | {"version": 2}, ValueError, "got version 2: a newer one needs a newer renorm")
    refused(network(), good | {"extra": 1}, ValueError, "keys version, layers, fused in the recipe, got .*, extra")
    for change in (lambda of: of.pop("eps"), lambda of: of.update(epsilon=1), lambda of: of["limits"].pop("r_max")):
        bad = copy.deepcopy(good)
        change(bad["layers"]["4"])
        refused(network(), bad, ValueError, r"recipe must have the keys .* layer '4', got ")


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("channels_per_group", 3, r"cannot convert '4'.*channels_per_group must divide the 8 channels"),
        ("class", "BatchRenorm3d", "'4', a BatchNorm1d, to BatchRenorm3d, as the recipe says: BatchRenorm3d does not"),
        ("class", "BatchRenormAct2d", "'4', a BatchNorm1d, to BatchRenormAct2d.*BatchRenorm2d does not take 1d"),
        ("class", "Linear", "cannot convert '4' to 'Linear', which is no class of renorm"),
        ("frozen", "ice", "cannot convert '4': frozen must be None, 'running' or 'batch', got 'ice'"),
        ("sync", "all", "cannot convert '4': sync must be"),
        ("act", "tanh", "cannot convert '4': act must be"),
    ],
)
@pytest.mark.parametrize("converted", [False, True])
def test_what_does_not_suit_a_layer(setting: str, value: Any, match: str, converted: bool) -> None:
    model = convert(network(), renorm.BatchRenorm) if converted else network()
    bad = recipe(convert(network(), renorm.BatchRenorm, momentum=0.5))
    bad["layers"]["4"][setting] = value
    if converted and setting == "class":
        match = match if value == "Linear" else f"to {value}, as the recipe says: it is renorm's already"
    refused(model, bad, ValueError, match)


def test_layers_that_are_missing_or_no_batch_norm() -> None:
    named = recipe(convert(network(), renorm.BatchRenorm))
    refused(nn.Sequential(network()), named, ValueError, "model lacks what the recipe names: 1, 4; build the model")
    refused(
        nn.Sequential(*[nn.Linear(2, 2)] * 6), named, ValueError,
        "cannot convert '1', a Linear, to BatchRenorm2d, as the recipe says: it is no batch norm",
    )  # fmt: skip


def test_an_activation_is_not_lost_to_a_layer_without() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    refused(
        nn.Sequential(timm_layers.BatchNormAct2d(8)), recipe(nn.Sequential(renorm.BatchRenorm2d(8))), ValueError,
        "to BatchRenorm2d, as the recipe says: it can become BatchRenormAct2d",
    )  # fmt: skip


def test_layers_are_not_replaced_under_a_wrapper() -> None:
    named = recipe(nn.ModuleDict({"net": convert(network(), renorm.BatchRenorm)}))
    wrapped = nn.ModuleDict({"net": torch.compile(network(), backend="eager")})
    refused(wrapped, named, ValueError, "model must be converted before torch.compile")


def test_plain_layers_have_no_recipe() -> None:
    model = to_batchnorm(convert(network(), renorm.BatchRenorm))
    assert recipe(model) == {"version": 1, "layers": {}, "fused": []}
    assert convert(network(), recipe(model))[1].__class__ is nn.BatchNorm2d
