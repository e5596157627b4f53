"""Images whose centre is hidden, and its colour what a network is to tell."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..errors import LabError
from .dataset import Dataset, Part
from .image_files import ImageFiles


def hidden(dataset: Dataset) -> Dataset:
    """A data set for regression: the mean colour of each image's centre, which is hidden, half as high and as wide.

    Args:
        dataset: images with any labels; those to pretrain on stay as they are.

    Returns:
        The data set with the mean colours as labels, (N, C), standardized as images are.

    Raises:
        LabError: its images stay in their files.
    """
    train, validation, test = (_hidden(part, dataset) for part in (dataset.train, dataset.validation, dataset.test))
    return replace(dataset, train=train, validation=validation, test=test)


def _hidden(part: Part, dataset: Dataset) -> Part:
    if isinstance(part.images, ImageFiles):
        raise LabError(
            f"{dataset.source}: images that stay in their files cannot be hidden in part: image_size must be at most 64"
        )
    images = part.images.clone()
    centre = _centre(images)
    colours = centre.float().mean((2, 3), keepdim=True)
    centre.copy_(dataset.mean.round().expand_as(centre))
    return Part(images, ((colours - dataset.mean) / dataset.std).flatten(1))


def _centre(images: Tensor) -> Tensor:
    """A view of the middle half of rows and columns."""
    for dim in (2, 3):
        size = images.shape[dim]
        images = images.narrow(dim, size // 4, max(1, size // 2))
    return images
