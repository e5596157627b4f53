"""Data sets of large images, as they are laid out by torchvision or their authors, with the papers' splits.

Each reader takes the folder of the data sets and the height and width in pixels, and raises LabError where something is
missing or cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import LabError
from .dataset import Dataset, Part, assemble
from .folder import files_part, read_folder, read_tree
from .image_files import ImageFiles
from .split import split_validation

_CALTECH_COUNTS = (40, 10, 30)  # training, validation and test images of each class
_CALTECH_CLUTTER = "257.clutter"  # no category


def _caltech256(root: Path, image_size: int) -> Dataset:
    """Caltech-256 in caltech256/256_ObjectCategories/CLASS/IMAGE: 40, 10 and 30 images of each class, drawn once.

    Source:
        Summers & Dinneen 2020, section 4.1.
    """
    folder = root / "caltech256" / "256_ObjectCategories"
    everything, classes = read_tree(folder, image_size)
    wanted = [label for label, name in enumerate(classes) if name != _CALTECH_CLUTTER]
    generator = np.random.default_rng(0)
    chosen: tuple[list[int], ...] = ([], [], [])
    for label in wanted:
        examples = (everything.labels == label).nonzero()[:, 0].numpy()
        if len(examples) < sum(_CALTECH_COUNTS):
            raise LabError(
                f"{folder / classes[label]}: must have at least {sum(_CALTECH_COUNTS)} images, has {len(examples)}"
            )
        drawn = np.split(generator.permutation(examples)[: sum(_CALTECH_COUNTS)], np.cumsum(_CALTECH_COUNTS)[:-1])
        for part, indices in zip(chosen, drawn, strict=True):
            part.extend(indices.tolist())
    train, validation, test = (everything.subset(indices) for indices in chosen)
    return assemble(train, validation, test, str(folder))


def _flowers102(root: Path, image_size: int) -> Dataset:
    """Flowers-102 in flowers-102/jpg with imagelabels.mat and setid.mat, and its own three parts."""
    from scipy.io import loadmat

    folder = root / "flowers-102"
    try:
        with (folder / "imagelabels.mat").open("rb") as file:
            labels = loadmat(file)["labels"].ravel() - 1
        with (folder / "setid.mat").open("rb") as file:
            found = loadmat(file)
        listed = [
            [(f"image_{number:05d}.jpg", int(labels[number - 1])) for number in found[name].ravel()]
            for name in ("trnid", "valid", "tstid")
        ]
    except Exception as error:  # scipy's reader raises anything at bytes that are wrong
        raise LabError(f"{folder}: {error or type(error).__name__}") from None
    train, validation, test = (_files(folder / "jpg", rows, image_size) for rows in listed)
    return assemble(train, validation, test, str(folder))


def _cub2011(root: Path, image_size: int) -> Dataset:
    """CUB-2011 in CUB_200_2011, with its images and lists; a quarter of its training part is for validation.

    Source:
        Summers & Dinneen 2020, section 4.1, for the validation part.
    """
    folder = root / "CUB_200_2011"
    try:
        names, labels, in_training = (
            [line.split()[1] for line in (folder / f"{name}.txt").read_text().splitlines()]
            for name in ("images", "image_class_labels", "train_test_split")
        )
        rows = [
            (name, int(label) - 1, flag == "1") for name, label, flag in zip(names, labels, in_training, strict=True)
        ]
    except (OSError, IndexError, ValueError) as error:
        raise LabError(f"{folder}: {error}") from None
    train, test = (
        _files(folder / "images", [(name, label) for name, label, flag in rows if flag == wanted], image_size)
        for wanted in (True, False)
    )
    return split_validation(train, test, str(folder), share=0.25)


NAMED: dict[str, Callable[[Path, int], Dataset]] = {
    "imagenet": lambda root, image_size: read_folder(root / "imagenet", image_size),
    "caltech256": _caltech256,
    "flowers102": _flowers102,
    "cub2011": _cub2011,
}


def _files(folder: Path, rows: list[tuple[str, int]], image_size: int) -> Part:
    """Images and their labels, of which there are fewer than images."""
    for name, label in rows:
        if not (folder / name).is_file():
            raise LabError(f"{folder / name}: there is no such file")
        if not 0 <= label < len(rows):
            raise LabError(f"{folder / name}: must have a label from 0 to {len(rows) - 1}, got {label}")
    return files_part(ImageFiles([folder / name for name, _ in rows], image_size), [label for _, label in rows])
