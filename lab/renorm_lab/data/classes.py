"""Data sets whose parts differ in their classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..errors import LabError
from .arrays import check_shapes
from .dataset import Dataset, Part, array_parts, assemble
from .load import read_arrays
from .readers import TORCHVISION
from .shrink import shrunk

_TRAINING_SHARE, _VALIDATION_SHARE = 0.5, 0.2  # of classes


def load_unseen(source: str, root: Path, image_size: int) -> Dataset:
    """Read a data set for metric learning, where validation and test have classes that the training has not.

    Args:
        source: see `load_dataset`; anything but a folder. If its test classes are others than its training classes it
            stays as it is, but for a fifth of the training classes for validation; otherwise half of the classes are
            for training, a fifth for validation, and the rest for testing.
        root: folder of torchvision's data sets.
        image_size: height and width in pixels to which larger images are shrunk.

    Returns:
        The data set, with training labels from 0.

    Raises:
        LabError: it is not there, something is wrong with it, or it has too few classes.
    """
    arrays = read_arrays(source, root)
    if arrays is None:
        raise LabError(
            f"{source}: classes of a folder of images cannot be split; data must be an .npz file, digits or "
            f"one of {', '.join(TORCHVISION)}"
        )
    check_shapes(arrays, source)
    train, test = array_parts(shrunk(arrays, image_size))
    classes, test_classes = train.labels.unique(), test.labels.unique()
    if not torch.isin(test_classes, classes).any():
        seen, validation = _cut(classes, 1 - _VALIDATION_SHARE, source)
        return assemble(_of(train, seen, relabel=True), _of(train, validation), test, source)
    _require_classes(len(classes), source)
    everything = _joined(train, test)
    seen, others = _cut(classes, _TRAINING_SHARE, source)
    validation, unseen = _cut(others, _VALIDATION_SHARE / (1 - _TRAINING_SHARE), source)
    parts = _of(everything, seen, relabel=True), _of(everything, validation), _of(everything, unseen)
    return assemble(*parts, source)


def set_aside(dataset: Dataset, for_pretraining: bool, examples_per_class: int | None) -> Dataset:
    """A data set for fine-tuning.

    Args:
        dataset: all of it.
        for_pretraining: whether the second half of the classes is set aside for pretraining.
        examples_per_class: training examples that are kept of each remaining class, the first ones; by default all.

    Returns:
        The data set, with labels from 0.

    Raises:
        LabError: a class has fewer training examples, or there are too few classes.
    """
    if for_pretraining:
        _require_classes(dataset.num_classes, dataset.source)
        classes = torch.arange(dataset.num_classes)
        kept, aside = classes.chunk(2)
        parts = (dataset.train, dataset.validation, dataset.test)
        train, validation, test = (_of(part, kept) for part in parts)
        pretraining = _of(dataset.train, aside, relabel=True)
        dataset = replace(dataset, train=train, validation=validation, test=test, pretraining=pretraining)
    if examples_per_class is None:
        return dataset
    return replace(dataset, train=_first(dataset.train, examples_per_class, dataset.source))


def _first(part: Part, count: int, source: str) -> Part:
    chosen = [(part.labels == label).nonzero()[:count, 0] for label in part.labels.unique()]
    least = min(map(len, chosen))
    if least < count:
        raise LabError(f"{source}: a class has {least} training images, fewer than examples_per_class={count}")
    return part.subset(torch.cat(chosen).tolist())


def _of(part: Part, classes: torch.Tensor, *, relabel: bool = False) -> Part:
    chosen = part.subset(torch.isin(part.labels, classes).nonzero()[:, 0].tolist())
    return Part(chosen.images, torch.searchsorted(classes, chosen.labels)) if relabel else chosen


def _require_classes(number: int, source: str) -> None:
    if number < 4:
        raise LabError(f"{source}: must have at least 4 classes to split them, has {number}")


def _cut(classes: torch.Tensor, share: float, source: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Some of the classes, and the others; the same every time."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(classes)))
    first = min(max(1, round(share * len(classes))), len(classes) - 1)
    if first < 1:
        raise LabError(f"{source}: has too few classes to split them")
    return classes[order[:first]].sort().values, classes[order[first:]].sort().values


def _joined(train: Part, test: Part) -> Part:
    assert isinstance(train.images, torch.Tensor)
    assert isinstance(test.images, torch.Tensor)
    return Part(torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels]))
