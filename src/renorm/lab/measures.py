"""What some recipes measure on a trained network besides accuracy and loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

import renorm
from renorm.samplers import ClassBatchSampler, RandomBatchSampler

from .batches import batches
from .data import Dataset, Part
from .objectives import Score, make_scoring
from .runs import Run

Measure = Callable[[Run, nn.Module, Dataset], dict[str, float]]
Batches = Iterable[tuple[Tensor, Tensor]]

CURVE_ALPHAS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0)
_CLASSES, _EXAMPLES_PER_CLASS = 25, 2  # of a batch in training-mode evaluation, Ioffe 2017, section 4.3
_BATCH_SIZE = 500
_ESTIMATION_BATCH = 128
_RANGE_BATCHES = 10


def measure(run: Run, model: nn.Module, dataset: Dataset) -> tuple[tuple[str, float], ...]:
    """Measure what a run asks for.

    Args:
        run: the run.
        model: its trained network; left as it was.
        dataset: its data.

    Returns:
        Pairs of a name and a number.
    """
    names = run.measures.split("+") if run.measures else []
    return tuple(pair for name in names for pair in MEASURES[name](run, model, dataset).items())


def training_mode(run: Run, model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Test accuracy where the network normalizes by its batch: 25 classes x 2 examples, and 50 independent examples.

    Source:
        Ioffe 2017, section 4.3.
    """
    part = dataset.test
    pairs = ClassBatchSampler(part.labels.cpu(), _CLASSES, _EXAMPLES_PER_CLASS, replacement=True, seed=run.seed)
    independent = RandomBatchSampler(len(part), min(len(part), pairs.batch_size), seed=run.seed)
    found: dict[str, float] = {}
    for name, sampler in (("25 classes x 2", pairs), ("i.i.d.", independent)):
        with _normalizing_by_batches(model):
            drawn = ((dataset.standardize(part.take(batch)), part.labels[batch]) for batch in sampler)
            found[f"training-mode test accuracy, {name}"] = _score(run, model, drawn).accuracy
    return found


def training_batches(run: Run, model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Accuracy on minibatches of the training, at evaluation and in training mode.

    Source:
        Ioffe 2017, section 4.3: the training accuracy falls with the test accuracy.
    """
    seen = list(islice(batches(run, dataset), min(run.steps, _RANGE_BATCHES)))
    found = {"training accuracy": _evaluated(run, model, seen).accuracy}
    with _normalizing_by_batches(model):
        found["training-mode training accuracy"] = _score(run, model, seen).accuracy
    return found


def weighing(run: Run, model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Accuracy and loss on the test part by example weight, and what `renorm.weigh` chooses on the validation part.

    Source:
        Summers & Dinneen 2020, section 3.1 and appendix D.
    """
    found: dict[str, float] = {}
    for metric in ("accuracy", "cross_entropy"):
        weighed = copy.deepcopy(model)
        _set_example_weight(weighed, run.example_weight)
        chosen = renorm.weigh(weighed, list(_batches(dataset, dataset.validation)), metric, show_progress=False)
        score = _evaluated(run, weighed, _batches(dataset, dataset.test))
        found |= {
            f"alpha for {metric}": chosen.best,
            f"gain in validation {metric}": chosen.gain.mean,
            f"gain in validation {metric}, low": chosen.gain.low,
            f"gain in validation {metric}, high": chosen.gain.high,
            f"test accuracy, weighed for {metric}": score.accuracy,
            f"test loss, weighed for {metric}": score.loss,
        }
    curve = {alpha: _at(run, model, dataset, alpha) for alpha in CURVE_ALPHAS}
    found |= {f"test accuracy at alpha = {alpha}": score.accuracy for alpha, score in curve.items()}
    return found | {f"test loss at alpha = {alpha}": score.loss for alpha, score in curve.items()}


def ranges(run: Run, model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Largest size of a normalized value in the last normalization layer, in training and at evaluation.

    Source:
        Summers & Dinneen 2020, equation 2 and appendix B.
    """
    training = islice(batches(run, dataset), min(run.steps, _RANGE_BATCHES))
    last = renorm.inspect(model, training, None, loss=None).layers[-1]
    test = renorm.inspect(model, _batches(dataset, dataset.test), None, loss=None).layers[-1]
    return {
        "elements in a group": last.elements,
        "bound": last.bound,
        "range in training": last.range_training,
        "range at evaluation": test.range_evaluation,
    }


def estimates(run: Run, model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Test accuracy and loss with running statistics estimated anew, on training images as they are and on test images.

    Source:
        Summers & Dinneen 2020, appendix C.
    """
    found: dict[str, float] = {}
    for name, part in (("training images, not augmented", dataset.train), ("test images", dataset.test)):
        estimated = copy.deepcopy(model)
        sampler = RandomBatchSampler(len(part), min(len(part), _ESTIMATION_BATCH), seed=run.seed)
        renorm.estimate(estimated, (dataset.standardize(part.take(batch)) for batch in sampler))
        score = _evaluated(run, estimated, _batches(dataset, dataset.test))
        found |= {
            f"test accuracy, statistics of {name}": score.accuracy,
            f"test loss, statistics of {name}": score.loss,
        }
    return found


MEASURES: dict[str, Measure] = {
    "training mode": training_mode,
    "training batches": training_batches,
    "weighing": weighing,
    "ranges": ranges,
    "estimates": estimates,
}


def _batches(dataset: Dataset, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in part.chunks(_BATCH_SIZE):
        yield dataset.standardize(images), labels


def _at(run: Run, model: nn.Module, dataset: Dataset, alpha: float) -> Score:
    weighed = copy.deepcopy(model)
    _set_example_weight(weighed, alpha)
    return _evaluated(run, weighed, _batches(dataset, dataset.test))


def _set_example_weight(model: nn.Module, alpha: float) -> None:
    for layer in _layers(model):
        layer.example_weight = alpha


def _layers(model: nn.Module) -> list[renorm.Norm]:
    return [module for module in model.modules() if isinstance(module, renorm.Norm)]


@contextmanager
def _normalizing_by_batches(model: nn.Module) -> Iterator[None]:
    """Normalization layers in training mode, everything else as at evaluation; nothing moves."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    for layer in _layers(model):
        layer.training = True
    try:
        with renorm.freeze(model):
            yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _evaluated(run: Run, model: nn.Module, drawn: Batches) -> Score:
    mode = model.training
    model.eval()
    score = _score(run, model, drawn)
    model.train(mode)
    return score


@torch.no_grad()
def _score(run: Run, model: nn.Module, drawn: Batches) -> Score:
    scoring = make_scoring(run)
    for images, labels in drawn:
        scoring.add(model(images), labels)
    return scoring.score()
