"""A start from weights that were trained on other classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..data import Dataset
from ..networks.methods import METHODS
from ..networks.network import make_network
from ..runs import Run
from .batches import batches
from .objectives import objective
from .optimizers import make_optimizer, make_schedule

_BATCH_SIZE = 128


def prepare(model: nn.Module, run: Run, dataset: Dataset, keep_going: Callable[[], object]) -> None:
    """Train a network of plain batch norm on the classes set aside for it, and take over its weights, in place.

    All but the last layer, whose classes are others. Does nothing unless the run says so.

    Args:
        model: the network, on the data's device.
        run: the run.
        dataset: with images to pretrain on.
        keep_going: called after each step; may raise to stop.
    """
    if not run.pretraining_steps:
        return
    assert dataset.pretraining is not None, "the recipe's data have images to pretrain on"
    plain = METHODS["batch_norm"]
    first = replace(
        run, tracking=plain.tracking, limits=plain.limits, examples_per_group=None, variant="",
        channels_per_group=plain.channels_per_group, steps=run.pretraining_steps, pretraining_steps=0,
        batch_size=min(_BATCH_SIZE, len(dataset.pretraining)), weight_decay=0.0, lr=0.05,
    )  # fmt: skip
    other = replace(dataset, train=dataset.pretraining, pretraining=None)
    source = make_network(first, other).to(dataset.mean)  # its device and dtype
    _train(source, first, other, keep_going)
    own = model.state_dict()
    taken = {name: value for name, value in source.state_dict().items() if value.shape == own[name].shape}
    model.load_state_dict(own | taken)


def _train(model: nn.Module, run: Run, dataset: Dataset, keep_going: Callable[[], object]) -> None:
    optimizer, loss = make_optimizer(model, run), objective(run)
    schedule = make_schedule(optimizer, run, run.steps)
    for images, labels in batches(run, dataset):
        optimizer.zero_grad()
        loss(model(images), labels).backward()
        optimizer.step()
        schedule.step()
        keep_going()
    torch.manual_seed(run.seed)  # what follows is the same whatever the pretraining drew
