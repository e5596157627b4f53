"""A data set ready for training: three parts as tensors, and how to standardize them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import LabError
from .arrays import Array, Arrays
from .image_files import ImageFiles

_STATISTICS_FILES = 1_000  # images, evenly spaced, whose mean and standard deviation stand for those of a folder


@dataclass(frozen=True)
class Part:
    """Images with labels.

    Args:
        images: (N, C, H, W), uint8; or files.
        labels: (N,), int64, of classes; in segmentation (N, H, W), a class for each pixel; or (N, D), float32, to be
            regressed.
    """

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Part:
        """The part on a device; files stay where they are."""
        images = self.images if isinstance(self.images, ImageFiles) else self.images.to(device)
        return Part(images, self.labels.to(device))

    def take(self, indices: Sequence[int]) -> Tensor:
        """Some images, on the labels' device.

        Args:
            indices: which.

        Returns:
            (N, C, H, W), uint8.
        """
        if isinstance(self.images, ImageFiles):
            return self.images.take(indices).to(self.labels.device)
        return self.images[indices]

    def subset(self, indices: Sequence[int]) -> Part:
        """A part of the part.

        Args:
            indices: its examples.
        """
        images = self.images.subset(indices) if isinstance(self.images, ImageFiles) else self.images[indices]
        return Part(images, self.labels[indices])

    def chunks(self, size: int, examples: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The examples in their order.

        Args:
            size: examples at a time.
            examples: number of first examples; by default all.

        Yields:
            Images, uint8, and labels.
        """
        stop = len(self) if examples is None else min(examples, len(self))
        for first in range(0, stop, size):
            last = min(first + size, stop)
            images = self.images[first:last] if isinstance(self.images, Tensor) else self.take(range(first, last))
            yield images, self.labels[first:last]


@dataclass(frozen=True)
class Dataset:
    """A data set in three parts.

    Args:
        source: name or path it comes from.
        train: what is trained on.
        validation: what alpha is chosen on.
        test: what is reported on.
        mean: of every channel over the training part, (C, 1, 1), in units of pixels.
        std: of every channel over the training part, (C, 1, 1), in units of pixels.
        pretraining: images of other classes, to train on before.
    """

    source: str
    train: Part
    validation: Part
    test: Part
    mean: Tensor
    std: Tensor
    pretraining: Part | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.train.labels.max()) + 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def standardize(self, images: Tensor) -> Tensor:
        """Images as the networks take them.

        Args:
            images: (N, C, H, W), uint8.

        Returns:
            The same in the dtype of `mean`, every channel with mean 0 and standard deviation 1 over the training part.
        """
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def first_classes(self, number: int) -> Dataset:
        """The data set without some of its classes.

        Args:
            number: classes that are kept, those with the smallest labels.

        Returns:
            The data set, standardized by what is left of the training part.

        Raises:
            LabError: it has fewer classes.
        """
        if number > self.num_classes:
            raise LabError(f"{self.source}: has {self.num_classes} classes, fewer than classes={number}")
        train, validation, test = (
            part.subset((part.labels < number).nonzero()[:, 0].tolist())
            for part in (self.train, self.validation, self.test)
        )
        return assemble(train, validation, test, self.source)

    def double(self) -> Dataset:
        """The data set for networks in float64."""
        return replace(self, mean=self.mean.double(), std=self.std.double())

    def to(self, device: torch.device) -> Dataset:
        """The data set on a device."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
            pretraining=None if self.pretraining is None else self.pretraining.to(device),
        )


def array_parts(arrays: Arrays) -> tuple[Part, Part]:
    """Arrays as tensors.

    Args:
        arrays: images and labels.

    Returns:
        What is for training, and what is for testing.
    """
    return _part(arrays.x_train, arrays.y_train), _part(arrays.x_test, arrays.y_test)


def _part(x: Array, y: Array) -> Part:
    return Part(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y.astype(np.int64)))


def assemble(train: Part, validation: Part, test: Part, source: str) -> Dataset:
    """A data set of its three parts.

    Args:
        train: what is trained on.
        validation: what alpha is chosen on.
        test: what is reported on.
        source: where they come from.

    Returns:
        The data set.
    """
    return Dataset(source, train, validation, test, *_statistics(train.images))


def _statistics(images: Tensor | ImageFiles) -> tuple[Tensor, Tensor]:
    if isinstance(images, ImageFiles):
        images = images.take(range(0, len(images), -(-len(images) // _STATISTICS_FILES)))
    channels = images.transpose(0, 1).flatten(1)
    moments = [torch.std_mean(channel.double(), correction=0) for channel in channels]  # one at a time, to save memory
    std, mean = (torch.stack(values).float().view(-1, 1, 1) for values in zip(*moments, strict=True))
    return mean, std.clamp_min(1.0)  # a channel that hardly varies is not blown up
