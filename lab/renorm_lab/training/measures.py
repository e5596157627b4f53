"""What some recipes measure on a trained network besides accuracy and loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

import renorm
from renorm.samplers import ClassBatchSampler, RandomBatchSampler

from ..data import Dataset, Part
from ..networks.unet import UNet
from ..runs import Run
from .batches import batches
from .evaluation import evaluate, score, set_example_weight, standardized
from .objectives import Score, make_scoring
from .tiles import by_tiles, foreground_in_empty_tiles, mismatch, stitched

Measure = Callable[[Run, nn.Module, Dataset], dict[str, float]]

CURVE_ALPHAS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0)
_CLASSES, _EXAMPLES_PER_CLASS = 25, 2  # of a batch in training-mode evaluation, Ioffe 2017, section 4.3
_ESTIMATION_BATCH = 128
_RANGE_BATCHES = 10
_TILES = 100  # in a forward at evaluation, where it does not matter


def measure(
    run: Run, model: nn.Module, dataset: Dataset, last: nn.Module | None = None
) -> tuple[tuple[str, float], ...]:
    """Measure what a run asks for.

    Args:
        run: the run.
        model: its trained network; left as it was.
        dataset: its data.
        last: the network of the last step, where the trained one is an average over steps; by default they are one.

    Returns:
        Pairs of a name and a number.
    """
    names = run.measures.split("+") if run.measures else []
    measures = MEASURES | {"averages": partial(averages, last=model if last is None else last)}
    return tuple(pair for name in names for pair in measures[name](run, model, dataset).items())


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
        with _evaluating(model, by_batches=True):
            drawn = ((dataset.standardize(part.take(batch)), part.labels[batch]) for batch in sampler)
            found[f"training-mode test accuracy, {name}"] = score(model, run, drawn).accuracy
    return found


def training_batches(run: Run, model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Accuracy on minibatches of the training, at evaluation and in training mode.

    Source:
        Ioffe 2017, section 4.3: the training accuracy falls with the test accuracy.
    """
    seen = list(islice(batches(run, dataset), min(run.steps, _RANGE_BATCHES)))
    with _evaluating(model):
        found = {"training accuracy": score(model, run, seen).accuracy}
    with _evaluating(model, by_batches=True):
        found["training-mode training accuracy"] = score(model, run, seen).accuracy
    return found


def like_training(run: Run, model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Test accuracy where the network normalizes by minibatches drawn as those of the training, and at evaluation."""
    drawn = batches(replace(run, augment=False, seed=run.seed + 1_000), replace(dataset, train=dataset.test))
    seen = list(islice(drawn, min(run.steps, _RANGE_BATCHES)))
    with _evaluating(model, by_batches=True):
        found = {"test accuracy in training mode": score(model, run, seen).accuracy}
    with _evaluating(model):
        return found | {"the same examples at evaluation": score(model, run, seen).accuracy}


def weighing(run: Run, model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Accuracy and loss on the test part by example weight, and what `renorm.weigh` chooses on the validation part.

    Source:
        Summers & Dinneen 2020, section 3.1 and appendix D.
    """
    found: dict[str, float] = {}
    for metric in ("accuracy", "cross_entropy"):
        set_example_weight(model, run.example_weight)
        chosen = renorm.weigh(model, list(standardized(dataset, dataset.validation)), metric, show_progress=False)
        at_best = evaluate(model, run, dataset, dataset.test, chosen.best)
        found |= {
            f"alpha for {metric}": chosen.best,
            f"gain in validation {metric}": chosen.gain.mean,
            f"gain in validation {metric}, low": chosen.gain.low,
            f"gain in validation {metric}, high": chosen.gain.high,
            f"test accuracy, weighed for {metric}": at_best.accuracy,
            f"test loss, weighed for {metric}": at_best.loss,
        }
    curve = {alpha: evaluate(model, run, dataset, dataset.test, alpha) for alpha in CURVE_ALPHAS}
    found |= {f"test accuracy at alpha = {alpha}": point.accuracy for alpha, point in curve.items()}
    return found | {f"test loss at alpha = {alpha}": point.loss for alpha, point in curve.items()}


def ranges(run: Run, model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Largest size of a normalized value in the last normalization layer, in training and at evaluation.

    Source:
        Summers & Dinneen 2020, equation 2 and appendix B.
    """
    training = islice(batches(run, dataset), min(run.steps, _RANGE_BATCHES))
    last = renorm.inspect(model, training, None, loss=None).layers[-1]
    test = renorm.inspect(model, standardized(dataset, dataset.test), None, loss=None).layers[-1]
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
        estimated = _estimated(run, model, dataset, part, _ESTIMATION_BATCH)
        found |= {f"test accuracy, statistics of {name}": estimated.accuracy}
        found |= {f"test loss, statistics of {name}": estimated.loss}
    return found


def tiles(run: Run, model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """What tiles of the training's size do to test scenes, at evaluation and in training mode.

    In training mode a forward takes as many tiles as in training, tiles that do not lie side by side. Tiles overlap by
    a quarter where they are put together, and by three quarters where neighbours are compared.

    Source:
        Buglakova et al. 2025 (arXiv 2503.19545): the mismatch of tiles, and the gap between the two modes.
    """
    assert isinstance(model, UNet)
    part, size = dataset.test, dataset.image_shape[1]
    scenes = dataset.standardize(part.take(range(len(part))))
    found: dict[str, float] = {}
    set_example_weight(model, run.example_weight)
    for by_batches, where, together in ((False, "", _TILES), (True, ", training mode", run.batch_size)):
        with _evaluating(model, by_batches=by_batches), torch.no_grad():
            predicted = by_tiles(model, scenes, size, size // 4, together)
        whole = stitched(predicted[:, ::3, ::3], 3 * size // 4)
        differences = mismatch(predicted, size // 4, model.margin)
        found |= {
            f"Dice by tiles{where}": _dice(run, whole, part.labels),
            f"mismatch{where}": differences.probability,
            f"labels that differ{where}": differences.labels,
            f"foreground in empty tiles{where}": foreground_in_empty_tiles(predicted, part.labels, size // 4),
        }
    set_example_weight(model, 0.0)
    return found


def _dice(run: Run, probabilities: Tensor, labels: Tensor) -> float:
    scoring = make_scoring(run)
    scoring.add(probabilities.log(), labels)
    return scoring.score().accuracy


def averages(run: Run, model: nn.Module, dataset: Dataset, last: nn.Module | None = None) -> dict[str, float]:
    """Test accuracy of the last weights, and of averaged ones by where their running statistics come from.

    Estimated anew are they on all training images, once in batches of the training's size, by which it normalized, and
    once in large ones.
    """
    last = model if last is None else last
    copied = copy.deepcopy(model)
    for buffer, newest in zip(copied.buffers(), last.buffers(), strict=True):
        buffer.copy_(newest)
    found = {
        f"test accuracy, {name}": evaluate(network, run, dataset, dataset.test, run.example_weight).accuracy
        for name, network in (("last weights", last), ("buffers averaged", model), ("buffers copied", copied))
    }
    for name, size in (("as in training", run.batch_size), (f"in batches of {_ESTIMATION_BATCH}", _ESTIMATION_BATCH)):
        estimated = _estimated(run, model, dataset, dataset.train, size)
        found[f"test accuracy, buffers estimated {name}"] = estimated.accuracy
    return found


def _estimated(run: Run, model: nn.Module, dataset: Dataset, part: Part, batch_size: int) -> Score:
    """Quality on the test part, with running statistics of a part in batches of a size."""
    estimated = copy.deepcopy(model)
    sampler = RandomBatchSampler(len(part), min(len(part), batch_size), seed=run.seed)
    try:
        renorm.estimate(estimated, (dataset.standardize(part.take(batch)) for batch in sampler))
    except ValueError:
        return Score(math.nan, math.nan)  # a training that diverged has no statistics, and is a result too
    return evaluate(estimated, run, dataset, dataset.test, run.example_weight)


MEASURES: dict[str, Measure] = {
    "training mode": training_mode,
    "training batches": training_batches,
    "like training": like_training,
    "weighing": weighing,
    "ranges": ranges,
    "estimates": estimates,
    "tiles": tiles,
    "averages": averages,
}


@contextmanager
def _evaluating(model: nn.Module, *, by_batches: bool = False) -> Iterator[None]:
    """A network as at evaluation, but that its normalization layers may normalize by batches; nothing moves."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    for module in before:
        if isinstance(module, renorm.Norm):
            module.training = by_batches
    try:
        with renorm.freeze(model):
            yield
    finally:
        for module, mode in before.items():
            module.training = mode
