"""`renorm inspect`: a model of the user's on data, from the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

import renorm
from renorm.samplers import ClassBatchSampler, RandomBatchSampler

from .data import Dataset, load_dataset
from .errors import LabError
from .store import save_file
from .terminal import console


def inspect_model(
    model: str,
    data: str = "digits",
    *,
    data_root: Path = Path("data"),
    image_size: int = 32,
    batch_size: int = 32,
    classes_per_batch: int | None = None,
    batches: int = 50,
    csv: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Look for the difference between training and evaluation in a model's norm layers, and say what helps.

    Args:
        model: module:function that returns the trained model; the module may lie in the current folder.
        data: module:function that returns batches; or "digits", a torchvision data set's name, an .npz file or a folder
            of images, of which the validation part is taken, standardized.
        data_root: folder of torchvision's data sets.
        image_size: height and width in pixels of images from a folder.
        batch_size: examples of a batch, as in training.
        classes_per_batch: classes of a batch, as in training; by default batches are independent.
        batches: how many are looked at.
        csv: file for the layers' numbers.
        plot: file for the picture.

    Raises:
        LabError: something is not there, or not what it should be.
    """
    network = _made("model", model)
    if not isinstance(network, nn.Module):
        raise LabError(f"{model} must return a torch.nn.Module, got {type(network).__name__}")
    try:
        if ":" in data:
            loader = _made("data", data)
        else:
            loader = _loader(load_dataset(data, data_root, image_size), batch_size, classes_per_batch, batches)
        found = renorm.inspect(network, loader)
    except (TypeError, ValueError) as error:
        raise LabError(str(error)) from error
    console().print(found)
    if csv is not None:
        save_file(csv, found.to_csv)
    if plot is not None:
        _save(found, plot)


def _save(found: renorm.Inspection, plot: Path) -> None:
    kind = plot.suffix.removeprefix(".") or "png"
    try:
        save_file(plot, lambda path: found.plot().savefig(path, format=kind))
    except ValueError as error:  # no kind of picture
        raise LabError(f"{plot}: {error}") from None


def _made(option: str, place: str) -> Any:
    """What a function of the user's returns."""
    module, _, name = place.partition(":")
    if not (module and name):
        raise LabError(f"{option} must be module:function, got {place!r}")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LabError(f"{place}: {error}") from error
    finally:
        sys.path.pop(0)
    if isinstance(function, nn.Module) or not callable(function):
        raise LabError(f"{option} must be module:function, got {place!r}, a {type(function).__name__}")
    return function()


def _loader(dataset: Dataset, batch_size: int, classes: int | None, batches: int) -> Iterable[Any]:
    part = dataset.validation
    if batch_size > len(part):
        raise LabError(f"batch_size must be at most {len(part)}, the examples in the validation part, got {batch_size}")
    sampler: RandomBatchSampler | ClassBatchSampler = RandomBatchSampler(len(part), batch_size)
    if classes is not None:
        if batch_size % classes:
            raise LabError(f"batch_size must be a multiple of classes_per_batch={classes}, got {batch_size}")
        sampler = ClassBatchSampler(part.labels, classes, batch_size // classes, batches_per_epoch=batches)
    drawn = islice(sampler, batches)
    return ((dataset.standardize(part.take(indices)), part.labels[indices]) for indices in drawn)
