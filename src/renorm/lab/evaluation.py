"""How good a trained network is, and the example weight that suits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import renorm

from .data import Dataset, Part

ALPHAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_BATCH_SIZE = 500


@dataclass(frozen=True)
class Score:
    """Quality on a part of the data.

    Args:
        accuracy: share of examples classified correctly, in [0, 1].
        loss: mean cross-entropy in nats.
    """

    accuracy: float
    loss: float


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
def evaluate(model: nn.Module, dataset: Dataset, part: Part, alpha: float = 0.0, examples: int | None = None) -> Score:
    """Accuracy and loss of a network in evaluation mode; its mode is restored.

    Args:
        model: the network.
        dataset: data that `part` belongs to.
        part: what to evaluate on.
        alpha: example weight.
        examples: number of first examples to evaluate on; by default all.

    Returns:
        The score.
    """
    images, labels = part.images[:examples], part.labels[:examples]
    training = model.training
    model.eval()
    set_example_weight(model, alpha)
    correct, loss = 0, 0.0
    for batch, target in zip(images.split(_BATCH_SIZE), labels.split(_BATCH_SIZE), strict=True):
        logits = model(dataset.standardize(batch))
        correct += int((logits.argmax(1) == target).sum())
        loss += float(F.cross_entropy(logits, target, reduction="sum"))
    set_example_weight(model, 0.0)
    model.train(training)
    return Score(correct / len(labels), loss / len(labels))


def best_alpha(accuracy: Mapping[float, float]) -> float:
    """The example weight with the best accuracy; of equals the smallest, since alpha = 0 costs nothing.

    Args:
        accuracy: validation accuracy by alpha.

    Returns:
        alpha.
    """
    return min(accuracy, key=lambda alpha: (-accuracy[alpha], alpha))
