"""What is minimized, and what counts: classification, segmentation, metric learning, and regression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..runs import Run

_TEMPERATURE = 0.1
_ROWS = 500  # examples compared with all others at a time

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """Quality on a part of the data.

    Args:
        accuracy: share of examples classified correctly, in [0, 1]; in metric learning, whose nearest neighbour is of
            their own class (recall@1); in segmentation Dice, the mean over the classes but the background; in
            regression, the explained variance, or 0 where the mean explains more.
        loss: mean of the objective, in nats, or the mean square.
    """

    accuracy: float
    loss: float


class Scoring(Protocol):
    """Takes in a network's outputs."""

    def add(self, output: Tensor, labels: Tensor) -> None:
        """Take in outputs, (N, *), and labels, (N,), or (N, D) in regression."""

    def score(self) -> Score:
        """The quality over all that was added."""


def objective(run: Run) -> Loss:
    """What a run minimizes.

    Args:
        run: the run.

    Returns:
        A function of outputs, (N, *), and labels, (N,), to a loss in nats, 0-d; in regression of (N, D) and (N, D) to
        the mean square.
    """
    if run.objective == "regression":
        return F.mse_loss
    return contrastive_loss if run.objective == "metric" else F.cross_entropy


def make_scoring(run: Run) -> Scoring:
    """How a run's network is judged.

    Args:
        run: the run.

    Returns:
        An empty scoring.
    """
    if run.objective == "segmentation":
        return _Segmentation()
    if run.objective == "regression":
        return _Regression()
    return _Retrieval() if run.objective == "metric" else _Classification()


def contrastive_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of finding the other examples of one's class by cosine similarity.

    Args:
        embeddings: (N, D).
        labels: (N,); an example that is alone in its class does not count.

    Returns:
        Mean over examples in nats, 0-d.

    Source:
        Khosla et al. 2020, "Supervised contrastive learning", equation 2, with temperature 0.1.
    """
    directions = F.normalize(embeddings.float())
    losses, _, counts = _compare(directions, labels, 0, len(labels))
    return losses.sum() / counts.sum().clamp(min=1)


class _Classification:
    def __init__(self) -> None:
        self._correct, self._loss, self._examples = 0, 0.0, 0

    def add(self, output: Tensor, labels: Tensor) -> None:
        self._correct += int((output.argmax(1) == labels).sum())
        self._loss += float(F.cross_entropy(output, labels, reduction="sum"))
        self._examples += len(labels)

    def score(self) -> Score:
        return Score(self._correct / self._examples, self._loss / self._examples)


class _Segmentation:
    """Dice over all pixels together, so that an empty image does not count as one."""

    def __init__(self) -> None:
        self._overlap = self._sizes = torch.zeros((), dtype=torch.long)
        self._loss, self._pixels = 0.0, 0

    def add(self, output: Tensor, labels: Tensor) -> None:
        found, classes = output.argmax(1), output.shape[1]
        hits, both = found[found == labels], torch.cat([found.flatten(), labels.flatten()])
        self._overlap = self._overlap + hits.bincount(minlength=classes).cpu()
        self._sizes = self._sizes + both.bincount(minlength=classes).cpu()
        self._loss += float(F.cross_entropy(output, labels, reduction="sum"))
        self._pixels += labels.numel()

    def score(self) -> Score:
        dice = 2 * self._overlap[1:] / self._sizes[1:].clamp(min=1)
        return Score(float(dice.mean()), self._loss / self._pixels)


class _Regression:
    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, output: Tensor, labels: Tensor) -> None:
        self._outputs.append(output.float())
        self._labels.append(labels)

    def score(self) -> Score:
        labels = torch.cat(self._labels)
        loss = float(F.mse_loss(torch.cat(self._outputs), labels))
        return Score(max(0.0, 1 - loss / float(labels.var(0, correction=0).mean())), loss)


class _Retrieval:
    def __init__(self) -> None:
        self._directions: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, output: Tensor, labels: Tensor) -> None:
        self._directions.append(F.normalize(output.float()))
        self._labels.append(labels)

    def score(self) -> Score:
        directions, labels = torch.cat(self._directions), torch.cat(self._labels)
        correct, loss = 0, 0.0
        for first in range(0, len(labels), _ROWS):
            losses, found, _ = _compare(directions, labels, first, first + _ROWS)
            correct += int(found.sum())
            loss += float(losses.sum())
        return Score(correct / len(labels), loss / len(labels))


def _compare(directions: Tensor, labels: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of some examples, whether the nearest of all others is of their class, and whether any is."""
    rows = torch.arange(first, min(last, len(labels)), device=labels.device)
    itself = rows[:, None] == torch.arange(len(labels), device=labels.device)
    similarity = directions[rows] @ directions.T / _TEMPERATURE
    similarity = similarity.masked_fill(itself, -torch.inf)
    positive = (labels[rows][:, None] == labels) & ~itself
    likelihood = similarity.log_softmax(1).masked_fill(~positive, 0.0)
    losses = -likelihood.sum(1) / positive.sum(1).clamp(min=1)
    return losses, labels[similarity.argmax(1)] == labels[rows], positive.any(1)
