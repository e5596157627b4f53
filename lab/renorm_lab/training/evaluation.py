"""How good a trained network is, and the example weight that suits it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

import renorm

from ..data import Dataset, Part
from ..runs import Run
from .objectives import Score, make_scoring

Batches = Iterable[tuple[Tensor, Tensor]]

ALPHAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_BATCH_SIZE = 500


def set_example_weight(model: nn.Module, alpha: float) -> None:
    """Set the example weight of every normalization layer.

    Args:
        model: network of `renorm.Norm` layers.
        alpha: in [0, 1].
    """
    for module in model.modules():
        if isinstance(module, renorm.Norm):
            module.example_weight = alpha


def evaluate(
    model: nn.Module, run: Run, dataset: Dataset, part: Part, alpha: float = 0.0, examples: int | None = None
) -> Score:
    """Quality of a network in evaluation mode; its mode is restored, its example weight is 0 afterwards.

    Args:
        model: the network.
        run: says what counts, and in which precision.
        dataset: data that `part` belongs to.
        part: what to evaluate on.
        alpha: example weight.
        examples: number of first examples to evaluate on; by default all.

    Returns:
        The score.
    """
    training = model.training
    model.eval()
    set_example_weight(model, alpha)
    found = score(model, run, standardized(dataset, part, examples))
    set_example_weight(model, 0.0)
    model.train(training)
    return found


@torch.no_grad()
def score(model: nn.Module, run: Run, batches: Batches) -> Score:
    """Quality of a network in the mode and with the example weights that it has.

    Args:
        model: the network.
        run: says what counts, and in which precision.
        batches: standardized images, (N, C, H, W), and labels, (N,).

    Returns:
        The score.
    """
    scoring = make_scoring(run)
    for images, labels in batches:
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=run.precision == "bf16-mixed"):
            output = model(images)
        scoring.add(output.float(), labels)
    return scoring.score()


def standardized(dataset: Dataset, part: Part, examples: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """A part in its order, as networks take it.

    Args:
        dataset: data that `part` belongs to.
        part: of these data.
        examples: number of first examples; by default all.

    Yields:
        Images, (N, C, H, W), and labels, (N,).
    """
    for images, labels in part.chunks(_BATCH_SIZE, examples):
        yield dataset.standardize(images), labels


def best_alpha(accuracy: Mapping[float, float]) -> float:
    """The example weight with the best accuracy; of equals the smallest, since alpha = 0 costs nothing.

    Args:
        accuracy: validation accuracy by alpha.

    Returns:
        alpha.
    """
    return min(accuracy, key=lambda alpha: (-accuracy[alpha], alpha))
