"""How good a trained network is, and the example weight that suits it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

import renorm

from .data import Dataset, Part
from .objectives import Score, make_scoring
from .runs import Run

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


@torch.no_grad()
def evaluate(
    model: nn.Module, run: Run, dataset: Dataset, part: Part, alpha: float = 0.0, examples: int | None = None
) -> Score:
    """Quality of a network in evaluation mode; its mode is restored.

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
    training, scoring = model.training, make_scoring(run)
    model.eval()
    set_example_weight(model, alpha)
    for images, labels in part.chunks(_BATCH_SIZE, examples):
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=run.precision == "bf16-mixed"):
            output = model(dataset.standardize(images))
        scoring.add(output.float(), labels)
    set_example_weight(model, 0.0)
    model.train(training)
    return scoring.score()


def best_alpha(accuracy: Mapping[float, float]) -> float:
    """The example weight with the best accuracy; of equals the smallest, since alpha = 0 costs nothing.

    Args:
        accuracy: validation accuracy by alpha.

    Returns:
        alpha.
    """
    return min(accuracy, key=lambda alpha: (-accuracy[alpha], alpha))
