"""What a model is judged by: a number for every example, or a metric over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# From a model's output and the target to a score of each example, (N,).
ExampleScore = Callable[[Any, Any], Tensor]

_RESAMPLES = 1_000


@dataclass(frozen=True)
class Interval:
    """A mean, and where it lies with 95% confidence.

    Args:
        mean: over examples.
        low: 2.5th percentile over resamples of the examples.
        high: 97.5th percentile.
    """

    mean: float
    low: float
    high: float


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Whether the class with the largest logit is the right one.

    Args:
        output: logits, (N, classes).
        target: classes, (N,).

    Returns:
        1 where right, 0 elsewhere, (N,).
    """
    return (output.argmax(1) == target).double()


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in nats.

    Args:
        output: logits, (N, classes).
        target: classes, (N,), or probabilities, (N, classes).

    Returns:
        Of each example, (N,).
    """
    return F.cross_entropy(output, target, reduction="none").double()


def bootstrap(scores: Tensor) -> Interval:
    """A mean over examples with its confidence interval, from resamples of the examples with a fixed seed.

    Args:
        scores: of each example, (N,), at least one.

    Returns:
        The interval.
    """
    generator = torch.Generator().manual_seed(0)
    scores, number = scores.cpu().double(), len(scores)
    means = torch.stack(
        [scores[torch.randint(number, (number,), generator=generator)].mean() for _ in range(_RESAMPLES)]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(scores.mean()), low, high)
