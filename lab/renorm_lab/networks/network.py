"""The network of a run."""

from __future__ import annotations

import math

from torch import nn

import renorm

from ..data import Dataset
from ..runs import Run
from .methods import norm_factory
from .models import build_model
from .unet import UNet

_EMBEDDING = 64  # outputs of a network for metric learning


def make_network(run: Run, dataset: Dataset) -> nn.Module:
    """The network of a run, before its training.

    Args:
        run: the run.
        dataset: what it is trained on.

    Returns:
        A network from images, (N, C, H, W), to logits, (N, classes) or (N, classes, H, W), embeddings or what is
        regressed.

    Raises:
        ValueError: an option does not suit the network or the data.
    """
    outputs = _outputs(run, dataset)
    model = build_model(run.model, dataset.image_shape, outputs, norm_factory(run), pretrained=run.pretrained)
    if isinstance(model, UNet) != (run.objective == "segmentation"):
        raise ValueError(f"model must be unetN for segmentation, and for nothing else, got {run.model}")
    layers = [module for module in model.modules() if isinstance(module, renorm.Norm)]
    if not run.train_gamma:
        for layer in layers:
            assert layer.weight is not None
            layer.weight.requires_grad_(False)
    if run.limits:
        for layer in _unclipped(run.unclipped, model, layers):
            assert layer.limits is not None
            start = layer.limits.start  # of the correction, which then has no bound
            layer.limits = renorm.Limits(math.inf, math.inf, start, start, start)
    return model


def _outputs(run: Run, dataset: Dataset) -> int:
    if run.objective == "regression":
        return dataset.train.labels.shape[1]
    return _EMBEDDING if run.objective == "metric" else dataset.num_classes


def _unclipped(which: str, model: nn.Module, layers: list[renorm.Norm]) -> list[renorm.Norm]:
    if which in ("none", "all"):
        return layers if which == "all" else []
    if which not in ("followed", "exposed"):
        raise ValueError(f"unclipped must be none, all, followed or exposed, got {which}")
    groups = renorm.optim.param_groups(model, weight_decay=0.0)
    exposed = {id(gamma) for group in groups if group["name"] == "gamma" for gamma in group["params"]}
    return [layer for layer in layers if (id(layer.weight) in exposed) == (which == "exposed")]
