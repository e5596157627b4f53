"""Objectives, scores, and what recipes measure on a trained network."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import renorm
from renorm_lab.data import Dataset, load_dataset
from renorm_lab.networks.network import make_network
from renorm_lab.runs import Run
from renorm_lab.training.measures import CURVE_ALPHAS, MEASURES, measure
from renorm_lab.training.objectives import contrastive_loss, make_scoring, objective

from .test_parts import run

OF_CLASSIFIERS = [name for name in MEASURES if name != "tiles"]


def naive_contrastive_loss(embeddings: Tensor, labels: Tensor) -> float:
    losses = []
    for i, own in enumerate(labels):
        others = [j for j in range(len(labels)) if j != i]
        likeness = [float(F.cosine_similarity(embeddings[i], embeddings[j], dim=0)) / 0.1 for j in others]
        total = math.log(sum(math.exp(value) for value in likeness))
        positive = [total - value for j, value in zip(others, likeness, strict=True) if labels[j] == own]
        if positive:
            losses.append(sum(positive) / len(positive))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2], [3, 3, 3, 3, 3, 3]])
def test_contrastive_loss_is_its_formula(labels: list[int]):
    embeddings = torch.randn(6, 5)
    expected = naive_contrastive_loss(embeddings, torch.tensor(labels))
    assert float(contrastive_loss(embeddings, torch.tensor(labels))) == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_zero_is_not_that_of_an_example_alone_in_its_class():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-0.75, 0.66], [-0.75, -0.66]])
    labels = torch.tensor([0, 0, 1, 1])
    found = float(contrastive_loss(embeddings, labels))
    assert found == pytest.approx(naive_contrastive_loss(embeddings, labels), rel=1e-2)
    assert float(contrastive_loss(embeddings[:2], labels[:2])) == 0


def test_contrastive_loss_has_finite_gradients():
    embeddings = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4])
    contrastive_loss(embeddings, labels).backward()
    assert embeddings.grad.isfinite().all()


def test_recall_counts_nearest_neighbours_of_the_same_class():
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, -1.0]])
    labels = torch.tensor([0, 0, 1, 2, 3])
    scoring = make_scoring(run(objective="metric"))
    scoring.add(embeddings[:2], labels[:2])  # classes over several calls
    scoring.add(embeddings[2:], labels[2:])
    assert scoring.score().accuracy == 2 / 5


def test_recall_over_many_examples_is_that_of_all_pairs():
    embeddings, labels = torch.randn(1_203, 8), torch.randint(40, (1_203,))
    scoring = make_scoring(run(objective="metric"))
    scoring.add(embeddings, labels)
    directions = F.normalize(embeddings)
    likeness = (directions @ directions.T).fill_diagonal_(-2)
    assert scoring.score().accuracy == pytest.approx(float((labels[likeness.argmax(1)] == labels).double().mean()))
    assert scoring.score().loss == pytest.approx(float(contrastive_loss(embeddings, labels)), rel=1e-4)


def test_classification_is_scored_by_accuracy_and_cross_entropy():
    logits, labels = torch.randn(50, 4), torch.randint(4, (50,))
    scoring = make_scoring(run())
    for part in (slice(0, 20), slice(20, 50)):
        scoring.add(logits[part], labels[part])
    assert scoring.score().accuracy == float((logits.argmax(1) == labels).double().mean())
    assert scoring.score().loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert objective(run()) is F.cross_entropy


def test_regression_is_scored_by_the_variance_that_it_explains():
    labels = torch.randn(50, 3) * torch.tensor([1.0, 2.0, 3.0]) + 10
    outputs = labels + 0.5 * torch.randn(50, 3)
    scoring = make_scoring(run(objective="regression"))
    for part in (slice(0, 20), slice(20, 50)):
        scoring.add(outputs[part], labels[part])
    total = float(((labels - labels.mean(0)) ** 2).sum())
    assert scoring.score().accuracy == pytest.approx(1 - float(((outputs - labels) ** 2).sum()) / total, rel=1e-5)
    assert scoring.score().loss == pytest.approx(float(F.mse_loss(outputs, labels)), rel=1e-5)
    assert objective(run(objective="regression")) is F.mse_loss


@pytest.mark.parametrize("told", [20.0, math.nan])
def test_regression_that_is_worse_than_the_mean_explains_nothing(told: float):
    scoring = make_scoring(run(objective="regression"))
    scoring.add(torch.full((50, 1), told), torch.randn(50, 1))
    assert scoring.score().accuracy == 0


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", Path(), 8)


def settings(**changes) -> Run:
    return run(**{"examples_per_group": 4, "steps": 10} | changes)


@pytest.fixture
def model(digits: Dataset) -> nn.Module:
    """A little trained: statistics have moved."""
    network = make_network(settings(), digits)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for images, labels in [chunk for _ in range(10) for chunk in digits.train.chunks(100)]:
        optimizer.zero_grad()
        F.cross_entropy(network(digits.standardize(images)), labels).backward()
        optimizer.step()
    return network


@pytest.mark.parametrize("name", OF_CLASSIFIERS)
def test_measures_leave_the_network_as_it_was(name: str, digits: Dataset, model: nn.Module):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = measure(settings(measures=name), model, digits)
    assert len(dict(found)) == len(found) > 0
    assert all(math.isfinite(value) for _, value in found)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {module.training for module in model.modules()} == {True}
    assert {layer.example_weight for layer in model.modules() if isinstance(layer, renorm.Norm)} == {0.0}
    assert measure(settings(measures=name), model, digits) == found


def test_several_measures_are_asked_for_with_a_plus(digits: Dataset, model: nn.Module):
    both = measure(settings(measures="ranges+estimates"), model, digits)
    assert both == tuple(
        pair for name in ("ranges", "estimates") for pair in measure(settings(measures=name), model, digits)
    )
    assert measure(settings(), model, digits) == ()


def test_training_mode_normalizes_by_batches_of_50(digits: Dataset, model: nn.Module):
    sizes = []
    handle = model[2].register_forward_pre_hook(lambda layer, inputs: sizes.append((len(inputs[0]), layer.training)))
    found = dict(measure(settings(measures="training mode"), model, digits))
    handle.remove()
    assert set(sizes) == {(50, True)}
    assert set(found) == {"training-mode test accuracy, 25 classes x 2", "training-mode test accuracy, i.i.d."}


def test_ranges_stay_within_the_bound_of_a_group(digits: Dataset, model: nn.Module):
    found = dict(measure(settings(measures="ranges"), model, digits))
    assert found["elements in a group"] == 4
    assert found["bound"] == pytest.approx(math.sqrt(3))
    assert 1 < found["range in training"] <= found["bound"] * (1 + 1e-5) < found["range at evaluation"]


def test_weighing_has_the_curves(digits: Dataset, model: nn.Module):
    found = dict(measure(settings(measures="weighing"), model, digits))
    curve = [found[f"test accuracy at alpha = {alpha}"] for alpha in CURVE_ALPHAS]
    assert max(curve) > 0.5 > curve[-1]  # with alpha = 1 a perceptron's layer sees a single value
    assert 0 <= found["alpha for accuracy"] <= 1
    for metric in ("accuracy", "cross_entropy"):
        low, high = (found[f"gain in validation {metric}, {end}"] for end in ("low", "high"))
        assert low <= found[f"gain in validation {metric}"] <= high


def test_statistics_of_the_training_images_give_nearly_the_same_accuracy(digits: Dataset, model: nn.Module):
    found = dict(measure(settings(measures="estimates"), model, digits))
    accuracies = [value for name, value in found.items() if "accuracy" in name]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.5


def test_averages_are_told_by_where_their_buffers_come_from(digits: Dataset, model: nn.Module):
    last = copy.deepcopy(model)
    with torch.no_grad():
        for layer in last.modules():
            if isinstance(layer, renorm.Norm):
                layer.running_mean.fill_(100.0)
    found = dict(measure(settings(measures="averages"), model, digits, last))
    averaged, copied = (found[f"test accuracy, buffers {name}"] for name in ("averaged", "copied"))
    estimated = [value for name, value in found.items() if "estimated" in name]
    assert min(averaged, *estimated) > 0.5 > max(copied, found["test accuracy, last weights"])
    assert len(estimated) == 2


def test_measures_compute_in_the_precision_of_the_run(digits: Dataset, model: nn.Module):
    kinds = set()
    handle = model[-1].register_forward_hook(lambda layer, inputs, output: kinds.add(output.dtype))
    for precision, kind in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        kinds.clear()
        measure(settings(measures="training mode+training batches", precision=precision), model, digits)
        assert kinds == {kind}
    handle.remove()


@pytest.mark.parametrize("name", OF_CLASSIFIERS)
def test_a_training_that_diverged_can_be_measured(name: str, digits: Dataset, model: nn.Module):
    with torch.no_grad():
        model[1].weight.fill_(math.nan)
    found = dict(measure(settings(measures=name), model, digits))
    if name == "estimates":
        assert len(found) == 4
        assert all(math.isnan(value) for value in found.values())
