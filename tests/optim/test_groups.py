"""Parameter groups: who is in which, and what "auto" finds in forwards of all kinds."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import renorm
from renorm.optim import param_groups


def names_of(model: nn.Module, name: str, **options: Any) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group["params"] for group in param_groups(model, 1e-4, **options)}
    return [names[id(parameter)] for parameter in groups.get(name, [])]


def decayed_norms(model: nn.Module) -> list[str]:
    gammas = [name.removesuffix(".weight") for name in names_of(model, "gamma")]
    assert [name.removesuffix(".bias") for name in names_of(model, "beta")] == gammas
    return gammas


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.PReLU(), nn.Linear(4, 4), nn.LayerNorm(4))


# --- the groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toward", [0, 1])
@pytest.mark.parametrize("norm", ["auto", "all", "none"])
def test_every_parameter_is_in_one_group(norm: Any, toward: Any) -> None:
    model = network()
    groups = param_groups(model, 0.1, norm, toward)
    together = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(together) == sorted(map(id, model.parameters()))
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize(
    ("norm", "gammas", "betas"),
    [("auto", ["4.weight"], ["4.bias"]), ("all", ["1.weight", "4.weight"], ["1.bias", "4.bias"]), ("none", [], [])],
)
def test_only_gamma_and_beta_depend_on_norm(norm: str, gammas: list[str], betas: list[str]) -> None:
    model = network()
    assert names_of(model, "not norm", norm=norm) == ["0.weight", "0.bias", "2.weight", "3.weight", "3.bias"]
    assert names_of(model, "gamma", norm=norm) == gammas
    assert names_of(model, "beta", norm=norm) == betas
    rest = [name for name in ("1.weight", "1.bias", "4.weight", "4.bias") if name not in gammas + betas]
    assert names_of(model, "norm, not decayed", norm=norm) == rest


def test_all_is_what_an_optimizer_does_without_groups() -> None:
    model, other = network(), network()
    other.load_state_dict(model.state_dict())
    ours = torch.optim.AdamW(param_groups(model, 0.3, "all"), lr=0.1)
    plain = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.3)
    x = torch.randn(8, 4)
    for one, its in ((model, ours), (other, plain)):
        one(x).square().sum().backward()
        its.step()
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_what_is_not_decayed_has_a_weight_decay_of_zero_whatever_the_optimizers_default() -> None:
    model = network()
    optimizer = torch.optim.AdamW(param_groups(model, 0.3), lr=0.1)
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "not norm": 0.3, "gamma": 0.3, "beta": 0.3, "norm, not decayed": 0.0,
    }  # fmt: skip


def test_frozen_parameters_are_in_no_group() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    assert names_of(model, "not norm") == ["0.bias", "2.weight", "3.weight", "3.bias"]
    assert names_of(model, "gamma") == []
    assert names_of(model, "beta") == ["4.bias"]


def test_a_shared_parameter_is_decayed_if_one_of_its_layers_is() -> None:
    model = network()
    model[4].weight = model[1].weight
    groups = {group["name"]: group["params"] for group in param_groups(model, 0.1)}
    assert [parameter is model[1].weight for parameter in groups["gamma"]] == [True]
    assert [parameter is model[1].bias for parameter in groups["norm, not decayed"]] == [True]


def test_layers_without_parameters_count_on_the_path() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4, elementwise_affine=False))
    assert decayed_norms(model) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, got -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0 and finite, got nan"),
        ({"weight_decay": 0.1, "norm": "some"}, "norm must be 'auto', 'all' or 'none', got 'some'"),
        ({"weight_decay": 0.1, "toward": 2}, "toward must be 0 or 1, got 2"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(network(), **options)


# --- what "auto" finds ------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two norm layers, a and b, for forwards that say how they are called."""

    def __init__(self, layer: Any = nn.BatchNorm1d) -> None:
        super().__init__()
        self.a, self.b = layer(4), layer(4)
        self.linear = nn.Linear(4, 4)


class Chain(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.linear(self.a(x)).relu())


class Skip(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x + self.b(self.linear(x))


class OptionalSkip(Layers):
    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        x = self.a(x)
        y = self.b(self.linear(x))
        return x + y if skip else y


class SkipInPlace(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(self.linear(x))
        y.add_(x)
        return y


class OutputOfBoth(Layers):
    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.a(x)
        return {"features": [x], "logits": self.b(self.linear(x))}


class OutputInTraining(Layers):
    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        y = self.b(self.linear(x))
        return (y, x) if self.training else y


class Uncalled(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.a(x))


class CalledTwice(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.linear(self.b(self.a(x))))


class ShapeOnly(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(self.linear(x)).view(x.size(0), x.shape[1], -1).squeeze(2)
        return y.type_as(x) + x.new_ones(1) + torch.zeros_like(x) + x.dim()


class Functional(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.linear(self.a(x)), (4,)) + F.group_norm(x, 2) + self.b(x)


class Residual(Layers):
    def __init__(self) -> None:
        super().__init__(renorm.BatchRenorm1d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.linear(x), residual=x, act="relu")


class ResidualByPosition(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.linear(x), None, x)


class Untraceable(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


class UntraceableWithoutNorm(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Untraceable(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.a(x)) + self.linear(self.b(x))


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Chain(), ["b"]),
        (Skip(), ["a", "b"]),
        (OptionalSkip(), ["b"]),
        (SkipInPlace(), ["a", "b"]),
        (OutputOfBoth(), ["a", "b"]),
        (OutputInTraining(), ["a", "b"]),
        (OutputInTraining().eval(), ["a", "b"]),
        (Uncalled(), ["a"]),
        (CalledTwice(), ["a"]),
        (ShapeOnly(), ["b"]),
        (Functional(), ["b"]),
        (Residual(), ["a", "b"]),
        (ResidualByPosition(), ["a", "b"]),
        (UntraceableWithoutNorm(), ["a", "b"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_are_decayed_if_a_path_of_values_passes_no_other(model: nn.Module, found: list[str]) -> None:
    assert decayed_norms(model) == found


@pytest.mark.parametrize(
    "layer",
    [
        renorm.BatchRenorm1d, lambda c: renorm.GhostBatchNorm1d(c, 2), nn.SyncBatchNorm, nn.LayerNorm,
        lambda c: nn.GroupNorm(2, c), lambda c: nn.InstanceNorm1d(c, affine=True),
    ],
)  # fmt: skip
def test_every_kind_of_norm_layer_is_one(layer: Any) -> None:
    class OfThese(Chain):
        def __init__(self) -> None:
            super().__init__(layer)

    assert decayed_norms(OfThese()) == ["b"]


def test_a_layer_without_beta_has_its_gamma_decayed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    assert names_of(model, "gamma") == ["1.weight"]
    assert names_of(model, "beta") == []


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), renorm.BatchRenorm1d(4)])
def test_the_model_may_be_a_norm_layer(layer: nn.Module) -> None:
    assert names_of(layer, "gamma") == ["weight"]


class Sequences(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.rnn = renorm.BatchRenormLSTM(4, 4, num_layers=2, **options)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.norm(x))[0])


@pytest.mark.parametrize(("bidirectional", "cells"), [(False, [1]), (True, [2, 3])])
def test_of_a_recurrent_layer_the_last_cells_are_decayed(bidirectional: bool, cells: list[int]) -> None:
    layers = ("norm_ih", "norm_hh", "norm_cell")
    gammas = names_of(Sequences(bidirectional=bidirectional), "gamma")
    assert gammas == [f"rnn.cells.{cell}.{layer}.weight" for cell in cells for layer in layers]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_wrapped_models_are_looked_through() -> None:
    model = Skip()
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert len(decayed_norms(wrapped)) == 2


# --- where tracing fails, and what it leaves --------------------------------------------------------------------


class ChangesItself(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept = x
        self.seen.add_(1)
        return super().forward(x)


class DropsLayers(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if random.random() < 0.5 or torch.rand(()) < 0.5 else x


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = ChangesItself().eval()
    model.b.train()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    assert decayed_norms(model) == ["b"]
    assert (model.calls, hasattr(model, "kept")) == (0, False)
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Untraceable(nn.BatchNorm1d(4)), "torch.fx cannot trace Untraceable .*control flow"),
        (DropsLayers(), "DropsLayers draws random numbers"),
        (nn.TransformerEncoderLayer(4, 1), "torch.fx cannot trace TransformerEncoderLayer"),
    ],
    ids=["control flow", "random", "torch's own"],
)
def test_a_model_that_cannot_be_traced_has_no_norm_layer_decayed_and_a_warning_says_so(
    model: nn.Module, reason: str
) -> None:
    states = random.getstate(), torch.get_rng_state()
    with pytest.warns(UserWarning, match=f"falls back to 'none', which decays no gamma and no beta: {reason}"):
        groups = param_groups(model, 0.1)
    assert [group["name"] for group in groups if group["weight_decay"]] in (["not norm"], [])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("norm", ["all", "none"])
def test_nothing_is_traced_where_it_does_not_matter(norm: Any) -> None:
    param_groups(Untraceable(nn.BatchNorm1d(4)), 0.1, norm)


def test_a_model_without_norm_layers_has_one_group() -> None:
    (group,) = param_groups(Untraceable(nn.Linear(4, 4)), 0.1)
    assert (group["name"], group["weight_decay"]) == ("not norm", 0.1)
