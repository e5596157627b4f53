"""Image folders: one sub-folder for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import LabError
from .dataset import Dataset, Part
from .image_files import ImageFiles
from .split import split_test, split_validation

_NAMED = 20  # classes that an error names
_LARGEST_IN_MEMORY = 64  # pixels of height and width; larger images stay in their files


def read_folder(path: Path, image_size: int) -> Dataset:
    """A tree of images: train/CLASS/IMAGE and test/CLASS/IMAGE (or val), or only CLASS/IMAGE, which is then split.

    Args:
        path: the folder.
        image_size: height and width in pixels to which images are resized and cropped. Above 64 they stay in their
            files and are decoded when they are needed, each time anew.

    Returns:
        The data, in colour.

    Raises:
        LabError: a folder is missing, a class is empty, an image cannot be read, or there are too few.
    """
    if not path.is_dir():
        raise LabError(f"{path}: there is no such folder")
    if not (path / "train").is_dir():
        everything, _ = read_tree(path, image_size)
        kept, held_out = split_test(everything.labels.numpy(), str(path))
        train, test = everything.subset(kept.tolist()), everything.subset(held_out.tolist())
        return split_validation(train, test, str(path))
    held = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if held is None:
        raise LabError(f"{path}: has a train folder, but neither test nor val")
    training, testing = _found(path / "train"), _found(held)
    if training.classes != testing.classes:
        odd = sorted(set(training.classes) ^ set(testing.classes))
        raise LabError(f"{path}: class {odd[0]} is not in both train and {held.name}")
    # in one, so that all bad files are told together
    everything = _read([*training.samples, *testing.samples], image_size)
    first = len(training.samples)
    parts = range(first), range(first, len(everything))
    for_training, for_testing = (everything.subset(list(part)) for part in parts)
    return split_validation(for_training, for_testing, str(path))


def read_tree(path: Path, image_size: int) -> tuple[Part, list[str]]:
    """A tree CLASS/IMAGE.

    Args:
        path: the folder.
        image_size: height and width in pixels.

    Returns:
        The images, and the names of the classes.

    Raises:
        LabError: there is no class, one is empty, or an image cannot be read.
    """
    found = _found(path)
    return _read(found.samples, image_size), found.classes


class _Tree(NamedTuple):
    classes: list[str]
    samples: list[tuple[str, int]]  # file and class


def _found(path: Path) -> _Tree:
    """The images of a tree in the order of torchvision's ImageFolder, which would go round and round in links."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    if not classes:
        raise LabError(f"{path}: holds no folder of a class")
    samples = [
        (os.path.join(folder, name), label)
        for label, name_of_class in enumerate(classes)
        for folder, names in sorted(_walk(path / name_of_class))
        for name in sorted(names)
        if name.lower().endswith(IMG_EXTENSIONS)
    ]
    empty = sorted(set(range(len(classes))) - {label for _, label in samples})
    if empty:
        named = ", ".join(classes[label] for label in empty[:_NAMED]) + ", ..." * (len(empty) > _NAMED)
        raise LabError(f"{path}: no valid file for the classes {named} (endings: {', '.join(IMG_EXTENSIONS)})")
    return _Tree(classes, samples)


def _walk(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders and the names in them, also where links lead, each once."""
    seen: set[str] = set()
    for folder, inner, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        yield folder, names


def _read(samples: Sequence[tuple[str, int]], image_size: int) -> Part:
    files = ImageFiles([Path(name) for name, _ in samples], image_size)
    return files_part(files, [label for _, label in samples])


def files_part(files: ImageFiles, labels: list[int]) -> Part:
    """Files as a part, read into memory if they are small.

    Args:
        files: the images.
        labels: class of each.

    Returns:
        The part.

    Raises:
        LabError: an image cannot be read.
    """
    if files.size <= _LARGEST_IN_MEMORY:
        return Part(files.take(range(len(files))), torch.tensor(labels))
    files.check()
    return Part(files, torch.tensor(labels))
