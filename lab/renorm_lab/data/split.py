"""Stratified parts of a data set, the same for every seed of a run."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import train_test_split

from ..errors import LabError
from .arrays import Array
from .dataset import Dataset, Part, assemble

_TEST_SHARE, _VALIDATION_SHARE = 0.25, 0.2


def split_validation(train: Part, test: Part, source: str, share: float = _VALIDATION_SHARE) -> Dataset:
    """Split off the validation part.

    Args:
        train: all that is not for testing.
        test: what is.
        source: where they come from.
        share: of the training images.

    Returns:
        The data set.

    Raises:
        LabError: there are too few images to split.
    """
    kept, validation = _stratified(train.labels.numpy(), share, f"{source}: cannot split off a validation part")
    return assemble(train.subset(kept.tolist()), train.subset(validation.tolist()), test, source)


def split_test(labels: Array, source: str) -> tuple[Array, Array]:
    """Split off a test part.

    Args:
        labels: (N,).
        source: where they come from, for the message.

    Returns:
        Indices of what is kept, and of the quarter that is for testing.

    Raises:
        LabError: there are too few images to split.
    """
    return _stratified(labels, _TEST_SHARE, f"{source}: cannot split off a test part")


def _stratified(labels: Array, share: float, failure: str) -> tuple[Array, Array]:
    try:
        kept, held_out = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=0)
    except ValueError as error:
        raise LabError(f"{failure}: {error}") from None
    return kept, held_out
