"""Scenes composed of the images of a data set, for segmentation: glyphs scattered over an uneven background."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, zoom

from .arrays import Array
from .dataset import Dataset, Part, assemble

SCENE = 256  # height and width in pixels
PATCH = 64  # of what is trained on
_TRAINING, _OF_VALIDATION = 4, 2  # scenes for one of the test, and of the test for one of validation
_PATCHES_PER_SCENE = 64
_CELL = 64  # squares of a scene that are each as crowded as chance has it
_CROWDING = (0, 0, 0, 1, 2, 6, 9)  # glyphs in a cell, each number as likely
_GLYPH = 24  # pixels to which small images are enlarged, in whole steps
_INK = 0.35  # share of the brightest pixel from which a pixel is the glyph's
_GROUND, _CONTRAST = 0.3, (0.12, 0.45)  # of the background and of a glyph, between black = 0 and white = 1
_TEXTURE, _NOISE, _LIGHT = 0.03, 0.06, 0.2  # standard deviations; the light's mean is 1


def compose(glyphs: Dataset, groups: int, scenes: int) -> Dataset:
    """Make scenes of a data set's images; each part's scenes of the images of that part, the same every time.

    A scene is 256 x 256 pixels, grey, cut into cells that are empty, sparse or crowded. Light, texture, noise and the
    glyphs' contrast vary.

    Args:
        glyphs: what lies in the scenes; bright images on black ones, or the other way round.
        groups: classes of pixels beside the background: the classes of glyphs, divided in their order.
        scenes: for the test; four times as many are for training, and half as many for validation.

    Returns:
        Patches of 64 x 64 pixels to train on, scenes for validation and test; labels are maps, (N, H, W), 0 for the
        background.

    Raises:
        ValueError: there are more groups than classes of glyphs, or glyphs are larger than a patch.

    Example:
        >>> from pathlib import Path
        >>> from renorm_lab.data import load_dataset
        >>> scenes = compose(load_dataset("digits", Path(), 32), groups=2, scenes=1)
        >>> scenes.train.images.shape, scenes.test.images.shape, scenes.test.labels.shape
        (torch.Size([256, 1, 64, 64]), torch.Size([1, 1, 256, 256]), torch.Size([1, 256, 256]))
    """
    if groups > glyphs.num_classes:
        raise ValueError(f"groups must be at most {glyphs.num_classes}, the classes of {glyphs.source}, got {groups}")
    largest = max(glyphs.image_shape[1:])
    if largest > PATCH:
        raise ValueError(f"image_size must be at most {PATCH}, the size of a patch, got images of {largest} pixels")
    group_of = np.arange(glyphs.num_classes) * groups // glyphs.num_classes + 1
    numbers = _TRAINING * scenes, max(1, scenes // _OF_VALIDATION), scenes
    train, validation, test = (
        _scenes(part, group_of, number, np.random.default_rng((0, stream)))
        for stream, (part, number) in enumerate(
            zip((glyphs.train, glyphs.validation, glyphs.test), numbers, strict=True)
        )
    )
    return assemble(_patches(train, np.random.default_rng((0, 3))), validation, test, glyphs.source)


def _scenes(glyphs: Part, group_of: Array, number: int, generator: np.random.Generator) -> Part:
    drawn = [_scene(glyphs, group_of, generator) for _ in range(number)]
    images, labels = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
    return Part(torch.from_numpy(images)[:, None], torch.from_numpy(labels))


def _scene(glyphs: Part, group_of: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """One scene, uint8, and its labels, int64."""
    above, labels = np.zeros((SCENE, SCENE)), np.zeros((SCENE, SCENE), np.int64)
    for top in range(0, SCENE, _CELL):
        for left in range(0, SCENE, _CELL):
            for index in generator.integers(len(glyphs), size=generator.choice(_CROWDING)):
                ink = _ink(glyphs.take([int(index)])[0])
                place = _place(ink.shape, (top, left), generator)
                covers = ink >= _INK
                above[place] = np.where(covers, generator.uniform(*_CONTRAST) * ink, above[place])
                labels[place][covers] = group_of[int(glyphs.labels[index])]
    light = 1 + _LIGHT * _smooth(64, generator)
    texture, noise = _TEXTURE * _smooth(2, generator), _NOISE * generator.standard_normal(above.shape)
    pixels = np.clip(light * (_GROUND + texture + above) + noise, 0, 1)
    return np.round(255 * pixels).astype(np.uint8), labels


def _ink(image: torch.Tensor) -> Array:
    """A glyph, (H, W), 0 for its ground and 1 for its brightest pixel, enlarged if it is small."""
    grey: Array = image.double().mean(0).cpu().numpy()
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    if border.mean() > grey.mean():  # dark on bright
        grey = grey.max() - grey
    times = max(1, math.floor(_GLYPH / max(grey.shape)))
    enlarged: Array = zoom(grey, times, order=1) if times > 1 else grey
    return np.asarray(np.clip(enlarged / max(enlarged.max(), 1.0), 0, 1))


def _place(shape: Sequence[int], cell: Sequence[int], generator: np.random.Generator) -> tuple[slice, slice]:
    """Where a glyph lies: its centre in the cell, all of it in the scene."""
    corner = [
        int(np.clip(first + generator.integers(_CELL) - size // 2, 0, SCENE - size))
        for first, size in zip(cell, shape, strict=True)
    ]
    rows, columns = (slice(first, first + size) for first, size in zip(corner, shape, strict=True))
    return rows, columns


def _smooth(width: float, generator: np.random.Generator) -> Array:
    """Random numbers that change over about `width` pixels, (H, W), with mean 0 and standard deviation 1."""
    field = gaussian_filter(generator.standard_normal((SCENE, SCENE)), width)
    return np.asarray((field - field.mean()) / field.std())


def _patches(scenes: Part, generator: np.random.Generator) -> Part:
    assert isinstance(scenes.images, torch.Tensor)
    images, labels = [], []
    for image, label in zip(scenes.images, scenes.labels, strict=True):
        for top, left in generator.integers(SCENE - PATCH + 1, size=(_PATCHES_PER_SCENE, 2)):
            images.append(image[:, top : top + PATCH, left : left + PATCH])
            labels.append(label[top : top + PATCH, left : left + PATCH])
    return Part(torch.stack(images), torch.stack(labels))
