"""The papers' own settings start and train, on a few images and for a few steps; the networks are theirs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from renorm_lab.jobs import job
from renorm_lab.recipes import RECIPES

from .conftest import arrays, at_scale

pytestmark = pytest.mark.slow

FEW = {"steps": 2, "seeds": 1, "workers": 1, "device": "cpu", "precision": "32-true", "logger": "none"}
INCEPTION = {"image_size": 75, "methods": ("batch_renorm",)}  # the least that Inception-v3 takes
PAIRS = {"classes_per_batch": 2, "examples_per_class": 2}
FINETUNE = {"batch_sizes": (4,), "ghost_size": 2, "pretrained": False, "methods": ("group_norm",), "steps": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "baseline": INCEPTION | {"batch_size": 4, "minibatches": 2},
    "microbatch": INCEPTION | {"batch_size": 8, "forward_size": 4, "group_sizes": (2,)},
    "noniid": INCEPTION | PAIRS | {"minibatches": 2, "independent": False},
    "noniid-classes": {"image_size": 16, "examples_per_class": 2, "ghost_sizes": (4, 2)},
    "weigh": {"image_size": 16, "batch_size": 8, "ghost_sizes": (4,)},
    "ghost": {"image_size": 16, "batch_size": 8, "ghost_sizes": (4, 2)},
    "decay": {"image_size": 75, "batch_size": 4, "decays": ("one",)},
    "smallbatch": {"image_size": 16, "reference_size": 2},
    "allfour": {"image_size": 16, "batch_sizes": (8,), "reference_size": 8},
    "finetune": FINETUNE | {"image_size": 65, "frozen_shares": ()},
    "finetune-regression": FINETUNE | {"methods": ("batch_norm",)},
    "range": {"image_size": 16, "batch_size": 8, "group_sizes": (8, 2)},
    "ablation": INCEPTION | PAIRS | {"num_changes": 1},
    "negative": {"image_size": 16, "batch_size": 8, "variants": ("random groups",)},
    "metric": {"batch_size": 16, "examples_per_class": (2,), "methods": ("batch_renorm",)},
    "combination": {"image_size": 16, "batch_sizes": (8,), "reference_size": 8, "methods": ("batch_norm",)} | PAIRS,
    "tiles": {"image_size": 16, "scenes": 1, "batch_sizes": (1,)},
    "workers": {"image_size": 16, "examples_per_class": 2, "classes_per_worker": (1,)},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ImageNet is laid out: 5 classes, 12 images each for training and 2 for testing, of several sizes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 2)):
        for label in range(5):
            (root / "imagenet" / part / f"n{label:08d}").mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 50, (90 + index, 100, 3)) + 40 * label
                path = root / "imagenet" / part / f"n{label:08d}" / f"{index}.JPEG"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    np.savez(root / "characters.npz", **arrays(classes=20, size=28))
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_paper_scale_starts_and_trains(name: str, folder: Path, tmp_path: Path):
    data = {"data": str(folder / "characters.npz")} if name == "metric" else {"data": "imagenet", "data_root": folder}
    recipe = at_scale(RECIPES[name], "paper", **(FEW | data | {"out": tmp_path} | OPTIONS[name]))
    job.carry_out(recipe, "")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(recipe.runs(recipe.load()))
    paper = at_scale(RECIPES[name], "paper")
    assert {row["model"] for row in rows} == set(getattr(paper, "models", (paper.model,)))


def test_inception_trains_on_images_of_299_pixels(folder: Path, tmp_path: Path):
    options = FEW | {"steps": 1, "data_root": folder, "out": tmp_path, "methods": ("batch_renorm",)}
    recipe = at_scale(RECIPES["baseline"], "paper", **options, batch_size=4, minibatches=2)
    assert recipe.image_size == 299
    job.carry_out(recipe, "")
    assert (tmp_path / "results.csv").read_text().count("torchvision/inception_v3") == 1
