"""How weights move: optimizer, learning rate, and the average of the weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR
from torch.optim.optimizer import ParamsT
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import renorm

from ..runs import Run

_SGD_MOMENTUM = 0.9
_RMSPROP_DECAY, _RMSPROP_EPS = 0.9, 1.0  # Szegedy et al. 2016, section 8, as is the learning rate's
_DECAY, _DECAY_EPOCHS = 0.94, 2


def make_optimizer(model: nn.Module, run: Run) -> Optimizer:
    """The optimizer of a run.

    Args:
        model: the network.
        run: the run.

    Returns:
        The optimizer, which decays what the run says.

    Raises:
        ValueError: there is no such optimizer or decay.
    """
    decays_toward_one = run.weight_decay > 0 and run.norm_decay == "one"
    groups = _groups(model, run)
    if run.optimizer == "sgd":
        optimizer: Optimizer = torch.optim.SGD(groups, run.lr, momentum=_SGD_MOMENTUM)
    elif run.optimizer == "rmsprop":
        from timm.optim.rmsprop_tf import RMSpropTF

        optimizer = RMSpropTF(groups, run.lr, alpha=_RMSPROP_DECAY, momentum=_RMSPROP_DECAY, eps=_RMSPROP_EPS)
    else:
        raise ValueError(f"optimizer must be sgd or rmsprop, got {run.optimizer}")
    return renorm.optim.decay_toward_one(optimizer) if decays_toward_one else optimizer


def _groups(model: nn.Module, run: Run) -> ParamsT:
    if run.weight_decay == 0:
        return model.parameters()
    if run.norm_decay == "one":
        return renorm.optim.param_groups(model, run.weight_decay, "all", toward=1)
    return renorm.optim.param_groups(model, run.weight_decay, run.norm_decay)


def make_schedule(optimizer: Optimizer, run: Run, epoch_steps: int) -> LRScheduler:
    """The learning rate of a run, by step.

    Args:
        optimizer: of the run.
        run: the run.
        epoch_steps: steps of an epoch.

    Returns:
        The schedule, to be stepped after each step of the optimizer.

    Raises:
        ValueError: there is no such schedule.
    """
    if run.schedule == "cosine":
        return CosineAnnealingLR(optimizer, run.steps)
    if run.schedule == "exponential":
        return StepLR(optimizer, _DECAY_EPOCHS * epoch_steps, _DECAY)
    raise ValueError(f"schedule must be cosine or exponential, got {run.schedule}")


def make_average(model: nn.Module, run: Run) -> AveragedModel | None:
    """The exponential moving average of weights and running statistics, if the run is evaluated by it.

    Args:
        model: the network, on its device.
        run: the run.

    Returns:
        A copy of the network, to be updated after each step; None without averaging.
    """
    if not run.average:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(run.average), use_buffers=True)
