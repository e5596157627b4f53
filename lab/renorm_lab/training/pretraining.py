"""A start from weights that were trained on other classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data import Dataset, Part
from ..networks.methods import METHODS
from ..networks.network import make_network
from ..runs import Run
from .batches import batches
from .objectives import objective
from .optimizers import make_optimizer, make_schedule

_BATCH_SIZE, _RATE, _MOMENTUM = 128, 0.05, 0.1  # the momentum is nn.BatchNorm's own

# Weights that this process has trained, and on what: all runs of a seed start from the same ones.
_trained: dict[Run, tuple[Part, dict[str, Tensor]]] = {}


def prepare(model: nn.Module, run: Run, dataset: Dataset, keep_going: Callable[[], object]) -> None:
    """Train a network of plain batch norm on the classes set aside for it, and take over its weights, in place.

    All but the last layer, which is for other outputs. Does nothing unless the run says so, and trains once for all
    runs of a process that start alike.

    Args:
        model: the network, on the data's device.
        run: the run.
        dataset: with images to pretrain on.
        keep_going: called after each step; may raise to stop.
    """
    if not run.pretraining_steps:
        return
    part = dataset.pretraining
    assert part is not None, "the recipe's data have images to pretrain on"
    first = _first(run, min(_BATCH_SIZE, len(part)))
    if first not in _trained or _trained[first][0] is not part:
        _trained[first] = part, _train(first, replace(dataset, train=part, pretraining=None), keep_going)
    torch.manual_seed(run.seed)  # what follows is the same whatever the pretraining drew
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    own = model.state_dict()
    taken = {
        name: value
        for name, value in _trained[first][1].items()
        if value.shape == own[name].shape and not name.startswith(f"{head}.")
    }
    model.load_state_dict(own | taken)


def _first(run: Run, batch_size: int) -> Run:
    """The pretraining, with what it depends on and nothing else of the run."""
    plain = METHODS["batch_norm"]
    return Run(
        recipe="", data=run.data, model=run.model, regime="", method=plain.label, tracking=plain.tracking, limits=False,
        examples_per_group=None, channels_per_group=1, classes_per_batch=None, examples_per_class=None,
        batch_size=batch_size, forward_size=None, steps=run.pretraining_steps, lr=_RATE, momentum=_MOMENTUM,
        augment=run.augment, seed=run.seed, precision=run.precision,
    )  # fmt: skip


def _train(run: Run, dataset: Dataset, keep_going: Callable[[], object]) -> dict[str, Tensor]:
    torch.manual_seed(run.seed)
    model = make_network(run, dataset).to(dataset.mean)  # its device and dtype
    optimizer, loss = make_optimizer(model, run), objective(run)
    schedule = make_schedule(optimizer, run, run.steps)
    for images, labels in batches(run, dataset):
        optimizer.zero_grad()
        loss(model(images), labels).backward()
        optimizer.step()
        schedule.step()
        keep_going()
    return model.state_dict()
