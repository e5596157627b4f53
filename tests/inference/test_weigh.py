"""Choosing the example weight: against a sweep by hand, within its budget, and with nothing left behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import renorm
from renorm.inference.scores import bootstrap
from renorm.inference.weigh import _Search

DIGITS = load_digits()
X = torch.as_tensor(DIGITS.images, dtype=torch.float32).unsqueeze(1) / 16
Y = torch.as_tensor(DIGITS.target)
ORDER = torch.randperm(len(Y), generator=torch.Generator().manual_seed(0))
TRAIN, HELD_OUT = ORDER[:1_000], ORDER[1_000:]
LOADER = DataLoader(TensorDataset(X[HELD_OUT], Y[HELD_OUT]), 50)


def trained(dependent: bool) -> nn.Module:
    """A small network, trained in batches that have a light each, or on the images as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        chosen = TRAIN[torch.randint(len(TRAIN), (64,))]
        x = X[chosen] * 4 ** torch.randn(()) if dependent else X[chosen]
        loss = nn.functional.cross_entropy(model(x), Y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def in_their_own_light(x: Tensor) -> Tensor:
    """Each image brighter or darker, as the batches of the training were."""
    return x * 4 ** torch.randn(len(x), 1, 1, 1, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dependent() -> nn.Module:
    return trained(dependent=True)


@pytest.fixture(scope="module")
def independent() -> nn.Module:
    return trained(dependent=False)


def scores_by_hand(model: nn.Module, alpha: float, x: Tensor) -> Tensor:
    """The network's outputs with every batch norm layer written out."""
    for module in model:
        if not isinstance(module, nn.BatchNorm2d | renorm.BatchNorm2d):
            x = module(x)
            continue
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
        running_mean, running_var = (t[:, None, None] for t in (module.running_mean, module.running_var))
        var = (1 - alpha) * running_var + alpha * var + alpha * (1 - alpha) * (mean - running_mean) ** 2
        mean = (1 - alpha) * running_mean + alpha * mean
        weight, bias = module.weight[:, None, None], module.bias[:, None, None]
        x = (x - mean) / (var + module.eps).sqrt() * weight + bias
    return x


def test_lost_accuracy_is_won_back_by_more_than_its_interval(dependent: nn.Module) -> None:
    model, x = copy.deepcopy(dependent), in_their_own_light(X[HELD_OUT])
    found = renorm.weigh(model, DataLoader(TensorDataset(x, Y[HELD_OUT]), 50))
    assert found.alpha > 0
    assert found.gain.low > 0.02
    assert all(layer.example_weight == found.alpha for layer in (model[1], model[5]))
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == Y[HELD_OUT]).double().mean().item()
    assert right == pytest.approx(max(point.score.mean for point in found.curve))
    assert f"example_weight = {found.alpha:.3f} gains" in str(found)


@pytest.mark.parametrize("metric", ["accuracy", "cross_entropy"])
def test_the_curve_is_that_of_a_sweep_by_hand(dependent: nn.Module, metric: str) -> None:
    found = renorm.weigh(copy.deepcopy(dependent), LOADER, metric)
    with torch.no_grad():
        for point in found.curve:
            output = scores_by_hand(dependent, point.alpha, X[HELD_OUT])
            right = (output.argmax(1) == Y[HELD_OUT]).double().mean()
            expected = right if metric == "accuracy" else nn.functional.cross_entropy(output, Y[HELD_OUT]).double()
            tolerance = 1 / len(HELD_OUT) if metric == "accuracy" else 1e-5
            assert point.score.mean == pytest.approx(expected.item(), abs=tolerance)
            assert point.examples == len(HELD_OUT)


def test_the_best_is_near_that_of_a_fine_sweep(dependent: nn.Module) -> None:
    found = renorm.weigh(copy.deepcopy(dependent), LOADER, "cross_entropy")
    with torch.no_grad():
        losses = {
            alpha: nn.functional.cross_entropy(scores_by_hand(dependent, alpha / 100, X[HELD_OUT]), Y[HELD_OUT]).item()
            for alpha in range(101)
        }
    assert found.best == pytest.approx(min(losses, key=losses.__getitem__) / 100, abs=0.015)


def test_it_takes_at_most_eight_passes(dependent: nn.Module) -> None:
    model, examples = copy.deepcopy(dependent), 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal examples
        examples += len(inputs[0])

    model[0].register_forward_pre_hook(count)
    loader = DataLoader(TensorDataset(X[HELD_OUT], Y[HELD_OUT]), 20)
    found = renorm.weigh(model, loader)
    assert examples / len(HELD_OUT) == pytest.approx(found.passes)
    assert found.passes <= 8


@pytest.mark.parametrize("seed", range(30))
def test_any_curve_ends_within_the_budget(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Rough curves, plateaus and maxima anywhere, as accuracies have them."""
    generator = torch.Generator().manual_seed(seed)
    peak, rough = torch.rand(2, generator=generator).tolist()

    def scores(search: Any, alpha: float, stride: int) -> Tensor:
        search.evaluated += 80 // stride
        search.batches = 16
        noise = rough * 0.2 * math.sin(1e4 * alpha)
        return torch.full((80 // stride,), round(-((alpha - peak) ** 2) + noise, seed % 4)).double()

    monkeypatch.setattr(_Search, "_scores", scores)
    search = _Search(nn.Identity(), [], [], lambda model, batch: None, margin_of_nothing, higher=True)
    best = search.run()
    assert search.evaluated <= 8 * 80
    assert best == max(sorted(search.full), key=lambda alpha: float(search.full[alpha].mean()))


def margin_of_nothing(output: Tensor, target: Tensor) -> Tensor:
    return output


def test_where_nothing_is_to_be_gained_it_says_so_and_leaves_the_weight_at_0(independent: nn.Module) -> None:
    model = copy.deepcopy(independent)
    found = renorm.weigh(model, LOADER)
    assert found.alpha == model[1].example_weight == 0
    assert "within noise" in str(found) or "no example weight is better than 0" in str(found)


def test_a_metric_of_one_s_own(dependent: nn.Module) -> None:
    def margin(output: Tensor, target: Tensor) -> Tensor:
        return output.gather(1, target[:, None])[:, 0] - output.mean(1)

    found = renorm.weigh(copy.deepcopy(dependent), LOADER, margin, higher_is_better=True)
    assert found.metric == "margin"
    with torch.no_grad():
        for point in found.curve:
            expected = margin(scores_by_hand(dependent, point.alpha, X[HELD_OUT]), Y[HELD_OUT]).mean().item()
            assert point.score.mean == pytest.approx(expected, abs=1e-4)
    assert found.best == max(found.curve, key=lambda point: point.score.mean).alpha


def test_modes_and_gradients_are_as_before(dependent: nn.Module) -> None:
    model = copy.deepcopy(dependent).train()
    model[2].eval()
    renorm.weigh(model, LOADER)
    assert [module.training for module in model] == [i != 2 for i in range(len(model))]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_error_restores_the_example_weights(dependent: nn.Module) -> None:
    model = renorm.convert(copy.deepcopy(dependent), renorm.BatchNorm, example_weight=0.3)

    def failing(output: Tensor, target: Tensor) -> Tensor:
        if model[1].example_weight == 0.2:
            raise ArithmeticError
        return output[:, 0]

    with pytest.raises(ArithmeticError):
        renorm.weigh(model, LOADER, failing, higher_is_better=True)
    assert model[1].example_weight == 0.3


class Once:
    def __iter__(self) -> Iterator[Any]:
        return iter([X[:4]])


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        (iter(LOADER), {}, ValueError, "not an iterator"),
        ([], {}, ValueError, "loader has no example"),
        (Once(), {}, TypeError, r"a batch must be \(input, target\)"),
        (LOADER, {"metric": "f1"}, ValueError, "metric must be one of 'accuracy', 'cross_entropy' or a function"),
        (LOADER, {"metric": lambda y, t: y}, ValueError, "higher_is_better must be True or False"),
        (LOADER, {"metric": lambda y, t: y, "higher_is_better": True}, ValueError, r"of each example, \(N,\)"),
    ],
)
def test_what_cannot_be_weighed_is_refused(
    dependent: nn.Module, loader: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        renorm.weigh(copy.deepcopy(dependent), loader, **options)


def test_models_without_running_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="no norm layer with running statistics"):
        renorm.weigh(nn.Sequential(nn.Linear(3, 3)), [(torch.randn(2, 3), torch.zeros(2))])
    with pytest.raises(ValueError, match="model must contain its norm layer"):
        renorm.weigh(nn.BatchNorm1d(3), [(torch.randn(2, 3), torch.zeros(2))])


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    hits = sum(
        interval.low <= 0.3 <= interval.high
        for interval in (bootstrap((torch.rand(80) < 0.3).double()) for _ in range(100))
    )
    assert 88 <= hits <= 100
