"""Statistics that follow a stream: by what each batch is normalized, on what an output depends, and what is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nn.BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "batch norm": lambda: renorm.BatchNorm1d(4, example_weight=0.3),
    "batch renorm": lambda: renorm.BatchRenorm1d(4, limits=renorm.Limits.over(1_000)),
    "ghost": lambda: renorm.GhostBatchNorm1d(4, examples_per_group=4, momentum=None),
    "synchronized": lambda: renorm.BatchNorm1d(4, sync="batch"),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def model_of(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), make(), nn.Dropout(0.5))
    for _ in range(5):
        model(torch.randn(16, 3))
    return model.eval()


def everything(model: nn.Module) -> list[Any]:
    settings = ("training", "momentum", "limits", "frozen", "example_weight", "sync", "estimates", "blocks")
    found: list[Any] = [{name: getattr(module, name, None) for name in settings} for module in model.modules()]
    return [*found, *model.modules()]


@each_layer
def test_a_batch_is_normalized_by_those_before_it(make: Callable[[], nn.Module]) -> None:
    model = model_of(make)
    mean, var = model[1].running_mean.clone(), model[1].running_var.clone()
    eps = 1e-5
    with torch.no_grad(), renorm.adapt(model, momentum=0.3):
        for batch in torch.randn(4, 16, 3) * 3 + 1:
            y, x = model(batch), model[0](batch)
            expected = (x - mean) / (var + eps).sqrt()
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            var = var.lerp(x.var(0, False), 0.3) + 0.3 * 0.7 * (x.mean(0) - mean).square()
            mean = mean.lerp(x.mean(0), 0.3)


def test_single_examples_move_the_variance_too() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with torch.no_grad(), renorm.adapt(model, momentum=0.01):
        for _ in range(1_000):
            model(2 * torch.randn(1, 3) + 5)
        torch.testing.assert_close(model[0].running_mean, torch.full((3,), 5.0), rtol=0.15, atol=0)
        torch.testing.assert_close(model[0].running_var, torch.full((3,), 4.0), rtol=0.5, atol=0)


@each_layer
@pytest.mark.parametrize("frozen", [None, "running", "batch"])
@pytest.mark.parametrize("error", [False, True])
def test_the_model_is_left_as_it_was(make: Callable[[], nn.Module], frozen: Any, error: bool) -> None:
    model = model_of(make)
    if isinstance(model[1], renorm.Norm):
        model[1].frozen = frozen
    model.train(error)
    before, state = everything(model), copy.deepcopy(model.state_dict())
    try:
        with renorm.adapt(model):
            model(torch.randn(16, 3) + 5)
            assert not torch.equal(model.state_dict()["1.running_mean"], state["1.running_mean"])
            if error:
                raise KeyError
    except KeyError:
        pass
    assert everything(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_neighbours_in_the_batch_do_not_matter() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    first, x, others = torch.randn(8, 3, 9, 9), torch.randn(1, 3, 9, 9), 4 * torch.randn(2, 7, 3, 9, 9)

    def among(neighbours: Tensor) -> Tensor:
        with torch.no_grad(), renorm.adapt(model, momentum=0.5):
            model(first)
            y: Tensor = model(torch.cat((x, neighbours)))[0]
        return y

    torch.testing.assert_close(among(others[0]), among(others[1]), rtol=1e-4, atol=1e-4)


def test_gradients_flow_as_in_training() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    x, dy = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
    with renorm.adapt(model):
        found = torch.autograd.grad(model(x), [x, *model.parameters()], dy)
    layer = renorm.BatchRenorm1d(4, limits=renorm.Limits.constant(1e9, 1e9)).train()
    expected = torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0, 1, -0.1, float("nan")])
def test_a_momentum_that_is_none_is_refused(momentum: float) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    with (
        pytest.raises(ValueError, match="momentum must be a number between 0 and 1"),
        renorm.adapt(model, momentum=momentum),
    ):
        pass


def test_a_model_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="no norm layer with running statistics"), renorm.adapt(nn.Linear(2, 2)):
        pass
