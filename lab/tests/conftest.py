"""Small data and recipes that take a second; one thread and a fixed seed, as in the library's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from renorm_lab.recipe import Recipe, Scale
from renorm_lab.recipes.microbatch import Microbatch
from renorm_lab.recipes.noniid import NonIid

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile without anything left from other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arrays(examples_per_class: int = 20, classes: int = 4, size: int = 8, channels: int = 1) -> dict[str, Any]:
    """Images that a network learns in no time: each class has a brightness of its own."""
    generator = np.random.default_rng(0)
    y = np.repeat(np.arange(classes), examples_per_class)
    noise = generator.integers(0, 20, (len(y), size, size, channels))
    x = (noise + 40 * y[:, None, None, None]).astype(np.uint8)
    return {"x_train": x, "y_train": y, "x_test": x[::2], "y_test": y[::2]}


def at_scale(recipe: type[Recipe], scale: Scale, **options: Any) -> Recipe:
    """A recipe with the defaults of a scale and options that override them, as from the command line."""
    return recipe(scale=scale, **{**recipe.scales[scale], **options})


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """A good .npz file."""
    path = tmp_path / "images.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture
def noniid(tmp_path: Path) -> NonIid:
    """Four runs in this process."""
    return NonIid(methods=("batch_norm", "batch_renorm"), seeds=1, steps=20, workers=1, out=tmp_path / "noniid")


@pytest.fixture
def microbatch(tmp_path: Path) -> Microbatch:
    """Two runs in this process."""
    return Microbatch(
        methods=("batch_group_renorm",), group_sizes=(8, 2), seeds=1, steps=4, workers=1, out=tmp_path / "microbatch"
    )
