"""One run: train a network, choose its example weight, test it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import renorm

from .batches import batches
from .data import Dataset
from .evaluation import ALPHAS, best_alpha, evaluate
from .methods import norm_factory
from .models import build_model
from .runs import CurvePoint, Result, Run

_SGD_MOMENTUM = 0.9
_CURVE_POINTS = 20
_CURVE_EXAMPLES = 1_000  # of the validation part, so that large data sets do not slow the training down


def train(run: Run, dataset: Dataset, progress: Callable[[int], None]) -> Result:
    """Carry out a run.

    Args:
        run: the run.
        dataset: the data, on the device to train on.
        progress: called with the number of steps done after each of them; may raise to stop.

    Returns:
        The result.
    """
    start = time.perf_counter()
    torch.manual_seed(run.seed)
    model = build_model(run.model, dataset.image_shape, dataset.num_classes, norm_factory(run))
    model.to(dataset.mean.device)
    curve = _optimize(model, run, dataset, progress)
    validation = {alpha: evaluate(model, dataset, dataset.validation, alpha).accuracy for alpha in ALPHAS}
    alpha = best_alpha(validation)
    off, on = (evaluate(model, dataset, dataset.test, weight) for weight in (0.0, alpha))
    return Result(
        alpha=alpha,
        validation_accuracy_off=validation[0.0],
        validation_accuracy_on=validation[alpha],
        test_accuracy_off=off.accuracy,
        test_accuracy_on=on.accuracy,
        test_loss_off=off.loss,
        test_loss_on=on.loss,
        seconds=time.perf_counter() - start,
        curve=curve,
    )


def _optimize(model: nn.Module, run: Run, dataset: Dataset, progress: Callable[[int], None]) -> tuple[CurvePoint, ...]:
    optimizer = torch.optim.SGD(model.parameters(), run.lr, momentum=_SGD_MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    curve: list[CurvePoint] = []
    losses: list[torch.Tensor] = []
    for step, (images, labels) in enumerate(batches(run, dataset), start=1):
        optimizer.zero_grad()
        loss = backward(model, images, labels, run.forward_size or len(labels))
        optimizer.step()
        schedule.step()
        losses.append(loss)
        if step * _CURVE_POINTS // run.steps > len(curve):
            score = evaluate(model, dataset, dataset.validation, examples=_CURVE_EXAMPLES)
            curve.append(CurvePoint(step, float(torch.stack(losses).mean()), score.accuracy))
            losses.clear()
        progress(step)
    return tuple(curve)


def backward(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, forward_size: int) -> torch.Tensor:
    """One gradient of a minibatch, from one or several forwards, and one move of the running statistics.

    Args:
        model: the network; gradients are added to its parameters'.
        images: (N, C, H, W).
        labels: (N,).
        forward_size: examples in a forward.

    Returns:
        Mean cross-entropy in nats, 0-d.
    """
    total = torch.zeros((), device=labels.device)
    with renorm.accumulate(model):
        for part, part_labels in zip(images.split(forward_size), labels.split(forward_size), strict=True):
            loss = F.cross_entropy(model(part), part_labels) * (len(part) / len(labels))
            loss.backward()
            total += loss.detach()
    return total
