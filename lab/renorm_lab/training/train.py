"""One run: train a network, choose its example weight, test it."""

from __future__ import annotations

import copy
import platform
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import renorm

from ..data import Dataset
from ..networks.network import make_network
from ..recipe import Recipe
from ..runs import CurvePoint, Result, Run
from ..store import save_weights
from .batches import batch_sampler, batches
from .checkpoints import Checkpoints, random_states, set_random_states
from .evaluation import ALPHAS, best_alpha, evaluate
from .loggers import Log
from .measures import measure
from .objectives import Loss, objective
from .optimizers import make_average, make_optimizer, make_schedule
from .pretraining import prepare
from .ranks import make_fabric, share_of

if TYPE_CHECKING:
    from lightning.fabric import Fabric

_LARGE = 32  # pixels of height, from which the CPU trains our networks faster as _speed_up makes them
_CURVE_POINTS = 20
_CURVE_EXAMPLES = 1_000  # of the validation part, so that large data sets do not slow the training down


def train(run: Run, dataset: Dataset, recipe: Recipe, progress: Callable[[int], None]) -> Result:
    """Carry out a run, from its last checkpoint if it has one.

    Args:
        run: the run.
        dataset: the data, on the device to train on.
        recipe: how to carry it out: device, checkpoints, logger, folder.
        progress: called with the number of steps done after each of them, and after each evaluation at the end; may
            raise to stop.

    Returns:
        The result.

    Raises:
        LabError: ranks cannot share the minibatches, or a file cannot be written.
    """
    if run.precision == "64-true":
        dataset = dataset.double()
    training = Training(run, dataset, recipe)
    with training.alone():
        return _result(training, run, dataset, recipe, progress)


def _result(training: Training, run: Run, dataset: Dataset, recipe: Recipe, progress: Callable[[int], None]) -> Result:
    training.finish(progress)
    model = training.trained
    if recipe.save_weights and training.fabric.is_global_zero:
        save_weights(recipe.folder, run, model)
    validation: dict[float, float] = {}
    for weight in ALPHAS:
        validation[weight] = evaluate(model, run, dataset, dataset.validation, weight).accuracy
        progress(run.steps)  # or an interrupt would wait for all of them
    alpha = best_alpha(validation)
    off, on = (evaluate(model, run, dataset, dataset.test, weight) for weight in (run.example_weight, alpha))
    measured = [model, training.model]
    if training.fabric.world_size > 1:
        measured = [_alone(network, run, dataset) for network in measured]
    return Result(
        alpha=alpha,
        validation_accuracy_off=validation[run.example_weight],
        validation_accuracy_on=validation[alpha],
        test_accuracy_off=off.accuracy,
        test_accuracy_on=on.accuracy,
        test_loss_off=off.loss,
        test_loss_on=on.loss,
        seconds=training.seconds,
        curve=tuple(training.curve),
        measures=measure(run, measured[0], dataset, measured[1]),
        versions=program_versions(),
    )


def program_versions() -> tuple[tuple[str, str], ...]:
    """The versions that stand beside a result.

    Returns:
        Pairs of a program and its version.
    """
    return ("renorm", renorm.__version__), ("torch", str(torch.__version__)), ("python", platform.python_version())


def _alone(model: nn.Module, run: Run, dataset: Dataset) -> nn.Module:
    """A trained network without what its layers have in common with those of other ranks."""
    with torch.random.fork_rng(devices=[]):  # what is measured draws the numbers that it draws in one process
        alone = make_network(replace(run, pretrained=False), dataset).to(dataset.mean)  # its device and dtype
    alone.load_state_dict(model.state_dict())
    return alone


def _speed_up(model: nn.Module, run: Run, dataset: Dataset, recipe: Recipe) -> None:
    """Change a network in place to what computes the same in less time, where that was measured."""
    ours = run.model.startswith(("resnet", "plain")) and not run.variant and not recipe.compile
    fused = ours and dataset.image_shape[1] >= _LARGE and dataset.mean.device.type == "cpu"
    if fused or dataset.mean.device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    if fused:
        renorm.convert(model, renorm.Norm, where=lambda *_: False, fuse=True, report=lambda _: None)


class Training:
    """A network and everything that changes while it is trained.

    Args:
        run: the run.
        dataset: the data, on the device to train on.
        recipe: how to carry it out.
    """

    def __init__(self, run: Run, dataset: Dataset, recipe: Recipe) -> None:
        self._started = time.perf_counter()
        self._run, self._dataset, self._recipe = run, dataset, recipe
        self.fabric = make_fabric(recipe.device, run.precision)
        self._share = share_of(run, self.fabric.world_size)
        torch.manual_seed(run.seed)
        random.seed(run.seed)
        self.model = make_network(self._share.layers_of(run), dataset).to(dataset.mean)  # its device and dtype
        _speed_up(self.model, run, dataset, recipe)
        self._share.synchronize(self.model)
        self._optimizer = make_optimizer(self.model, run)
        self._schedule = make_schedule(self._optimizer, run, len(batch_sampler(run, dataset.train)))
        self._average = make_average(self.model, run)
        self._step = 0
        self._losses: list[Tensor] = []  # since the last point of the curve
        self.curve: list[CurvePoint] = []
        self._checkpoints = Checkpoints(recipe.folder, run)

    @property
    def trained(self) -> nn.Module:
        """The network to evaluate."""
        return self.model if self._average is None else self._average.module

    @property
    def seconds(self) -> float:
        """Time since the start, without that between an interruption and the same command's coming again."""
        return time.perf_counter() - self._started

    def alone(self) -> AbstractContextManager[None]:
        """A block in which no worker of a killed command, which dies a moment after it, trains the same run."""
        return self._checkpoints.sole_writer() if self.fabric.is_global_zero else nullcontext()

    def finish(self, progress: Callable[[int], None]) -> None:
        """Train from the last checkpoint, or from the beginning, to the end.

        Args:
            progress: called with the number of steps done after each of them; may raise to stop.

        Raises:
            LabError: a checkpoint cannot be written.
        """
        if not self._resumes() and self._run.pretraining_steps:
            prepare(self.model, self._run, self._dataset, lambda: progress(0))
            self._save()
        recipe, run = self._recipe, self._run
        to_train: Any = torch.compile(self.model) if recipe.compile else self.model
        model, optimizer = self.fabric.setup(to_train, self._optimizer, move_to_device=False)
        loss = objective(run)
        with Log(recipe, run, self._step, self.model, writes=self.fabric.is_global_zero) as log:
            for images, labels in batches(run, self._dataset, self._step):
                optimizer.zero_grad()
                rank = self.fabric.global_rank
                mine = self._share.of(images, rank), self._share.of(labels, rank)
                frozen = self._step >= run.steps * (1 - run.frozen_share)
                self._losses.append(backward(self.fabric, model, loss, *mine, self._share.forward_size, frozen=frozen))
                optimizer.step()
                self._schedule.step()
                if self._average is not None:
                    self._average.update_parameters(self.model)
                self._step += 1
                self._observe(log)
                if self._step % recipe.checkpoint_every == 0:
                    self._save()
                progress(self._step)

    def _resumes(self) -> bool:
        """Whether there was a checkpoint to go on from; those that are none of this run's are set aside."""
        first: dict[str, Any] | None = None
        while True:
            state = self.fabric.broadcast(self._checkpoints.load() if self.fabric.is_global_zero else None)
            if state is None:
                return False
            if first is None:
                first = copy.deepcopy(self._state())
            try:
                self._set_state(state)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # whatever torch's objects raise at a state of other keys, shapes or types
                self._set_state(first)
            else:
                return True
            if self.fabric.is_global_zero:
                self._checkpoints.set_aside()

    def _observe(self, log: Log) -> None:
        run, step = self._run, self._step
        log.step(step, self._losses[-1], float(self._schedule.get_last_lr()[0]))
        if step * _CURVE_POINTS // run.steps > len(self.curve):
            loss = float(torch.stack(self._over_ranks(self._losses)).mean())
            part, alpha = self._dataset.validation, run.example_weight
            score = evaluate(self.trained, run, self._dataset, part, alpha, _CURVE_EXAMPLES)
            self.curve.append(CurvePoint(step, loss, score.accuracy))
            self._losses.clear()
            log.point(self.curve[-1])

    def _over_ranks(self, losses: list[Tensor]) -> list[Tensor]:
        """Means over the ranks' shares of the minibatches."""
        if not losses or self.fabric.world_size == 1:
            return losses
        merged = self.fabric.all_reduce(torch.stack(losses), reduce_op="mean")
        assert isinstance(merged, Tensor)
        return list(merged.unbind())

    def _save(self) -> None:
        self._losses = self._over_ranks(self._losses)  # so that one rank's state is that of all
        if self.fabric.is_global_zero:
            self._checkpoints.save(self._step, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "losses": self._losses,
            "curve": [astuple(point) for point in self.curve],
            "seconds": self.seconds,
            "random": random_states(self.fabric.device),
        }

    def _set_state(self, state: dict[str, Any]) -> None:
        device = self.fabric.device
        if not 0 <= state["step"] <= self._run.steps or len(state["curve"]) > _CURVE_POINTS:
            raise ValueError  # of another run
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._step = state["step"]
        self._losses = [loss.to(device) for loss in state["losses"]]
        self.curve = [CurvePoint(*point) for point in state["curve"]]
        self._started -= state["seconds"]
        set_random_states(state["random"], device)


def backward(
    fabric: Fabric,
    model: Any,
    loss: Loss,
    images: Tensor,
    labels: Tensor,
    forward_size: int,
    *,
    frozen: bool = False,
) -> Tensor:
    """One gradient of a minibatch, from one or several forwards, and one move of the running statistics.

    Args:
        fabric: that has set it up.
        model: the network as Fabric has set it up; gradients are added to its parameters'.
        loss: of outputs and labels, a mean over examples.
        images: (N, C, H, W).
        labels: (N, *).
        forward_size: examples in a forward.
        frozen: whether layers normalize by their running statistics, which stay.

    Returns:
        Mean loss, 0-d.
    """
    total = torch.zeros((), device=labels.device)
    parts = list(zip(images.split(forward_size), labels.split(forward_size), strict=True))
    with renorm.freeze(model, statistics="running") if frozen else renorm.accumulate(model):
        for number, (part, part_labels) in enumerate(parts, start=1):
            with fabric.no_backward_sync(model, enabled=number < len(parts)):
                part_loss = loss(model(part), part_labels) * (len(part) / len(labels))
                fabric.backward(part_loss)
            total += part_loss.detach()
    return total
