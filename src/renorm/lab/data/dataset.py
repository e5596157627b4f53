"""A data set ready for training: three parts as tensors, and how to standardize them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..errors import LabError
from .arrays import Array, Arrays

_VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class Part:
    """Images with labels.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> Part:
        """The part on a device."""
        return Part(self.images.to(device), self.labels.to(device))


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
    """

    source: str
    train: Part
    validation: Part
    test: Part
    mean: Tensor
    std: Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.train.labels.max()) + 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def standardize(self, images: Tensor) -> Tensor:
        """Images as the networks take them.

        Args:
            images: (N, C, H, W), uint8.

        Returns:
            The same in float32, every channel with mean 0 and standard deviation 1 over the training part.
        """
        return (images.float() - self.mean) / self.std

    def to(self, device: str) -> Dataset:
        """The data set on a device."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )


def make_dataset(arrays: Arrays, source: str) -> Dataset:
    """Split off the validation part: a fifth of the training images, stratified, the same for every seed of a run.

    Args:
        arrays: checked images and labels.
        source: where they come from.

    Returns:
        The data set.

    Raises:
        LabError: there are too few images to split.
    """
    x, y = arrays.x_train, arrays.y_train
    try:
        x_train, x_val, y_train, y_val = train_test_split(x, y, test_size=_VALIDATION_SHARE, stratify=y, random_state=0)
    except ValueError as error:
        raise LabError(f"{source}: cannot split off a validation part: {error}") from None
    train = _part(x_train, y_train)
    mean, std = _statistics(train.images)
    return Dataset(source, train, _part(x_val, y_val), _part(arrays.x_test, arrays.y_test), mean, std)


def _part(x: Array, y: Array) -> Part:
    images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    return Part(images, torch.from_numpy(y).long())


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    channels = images.transpose(0, 1).flatten(1)
    moments = [torch.std_mean(channel.double(), correction=0) for channel in channels]  # one at a time, to save memory
    std, mean = (torch.stack(values).float().view(-1, 1, 1) for values in zip(*moments, strict=True))
    return mean, std.clamp_min(1.0)  # a channel that hardly varies is not blown up
