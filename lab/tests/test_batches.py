"""Minibatches: of the run's regime, resumable, augmented."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from renorm_lab.data import Dataset, Part, load_dataset
from renorm_lab.data.augmentation import crop_and_flip
from renorm_lab.training.batches import batch_sampler, batches

from .test_data import save_images
from .test_parts import run


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", Path(), 8)


PAIRS = {"classes_per_batch": 5, "examples_per_class": 2, "replacement": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 64},
        {"batch_size": 10, **PAIRS},
        {"batch_size": 10, "order": "split", "examples_per_group": 5, **PAIRS},
        {"batch_size": 40, "forward_size": 10, **PAIRS},
    ],
)
@pytest.mark.parametrize("start", [1, 16, 17, 60])
def test_batches_go_on_where_they_were(changes: dict, start: int, digits: Dataset):
    settings = run(steps=62, **changes)
    whole = list(batches(settings, digits))
    assert len(whole) == 62
    rest = list(batches(settings, digits, start))
    assert len(rest) == 62 - start
    for (images, labels), (same_images, same_labels) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


def test_each_worker_draws_its_own_classes(digits: Dataset):
    settings = run(steps=40, batch_size=40, forward_size=10, **PAIRS)
    drawn = [labels.split(10) for _, labels in batches(settings, digits)]
    for parts in drawn:
        for part in parts:
            assert all(count % 2 == 0 for count in Counter(part.tolist()).values())
    firsts = {tuple(part.tolist()) for parts in drawn for part in parts}
    assert len(firsts) == 160  # no minibatch comes twice
    assert len(batch_sampler(settings, digits.train)) == 1077 // 10 // 4


def test_pairs_are_split_over_the_halves(digits: Dataset):
    settings = run(steps=30, batch_size=10, order="split", examples_per_group=5, **PAIRS)
    for _, labels in batches(settings, digits):
        first, second = (Counter(half.tolist()) for half in labels.split(5))
        assert first == second


@pytest.mark.parametrize(
    ("image_shape", "down", "across"), [((1, 16, 24), 2, 3), ((3, 32, 32), 4, 4), ((1, 7, 28), 1, 4)]
)
def test_crops_are_shifts_and_half_of_them_are_mirrored(image_shape: tuple[int, int, int], down: int, across: int):
    channels, height, width = image_shape
    place = torch.arange(height * width).view(1, 1, height, width) + 1
    images = place.expand(400, channels, -1, -1).float()
    made = crop_and_flip(images)
    assert made.shape == images.shape
    shifts, mirrored = set(), 0
    padded = torch.nn.functional.pad(place[0, 0], (across, across, down, down))
    for image in made:
        assert all(torch.equal(channel, image[0]) for channel in image)
        found = [
            (top, left, flip)
            for top in range(2 * down + 1)
            for left in range(2 * across + 1)
            for flip in (False, True)
            if torch.equal((image[0].flip(1) if flip else image[0]), padded[top : top + height, left : left + width])
        ] if image[0].max() > 0 else []  # fmt: skip
        if len(found) == 1:
            shifts.add(found[0][:2])
            mirrored += found[0][2]
    assert len(shifts) > 0.9 * (2 * down + 1) * (2 * across + 1)
    assert 0.3 < mirrored / 400 < 0.7


def test_augmentation_is_the_same_for_the_same_random_numbers():
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(crop_and_flip(images))
    assert torch.equal(*made)
    assert made[0].dtype == torch.uint8


@pytest.mark.parametrize("augment", [False, True])
def test_large_images_are_read_as_they_are_needed(augment: bool, tmp_path: Path):
    save_images(tmp_path, ["a", "b"], images=20)
    dataset = load_dataset(str(tmp_path), Path(), 70)
    assert dataset.image_shape == (3, 70, 70)
    assert not isinstance(dataset.train.images, torch.Tensor)
    settings = run(steps=5, batch_size=6, augment=augment)
    drawn = list(batches(settings, dataset))
    assert [(images.shape, labels.shape) for images, labels in drawn] == [((6, 3, 70, 70), (6,))] * 5
    torch.manual_seed(0)
    first = list(batches(settings, dataset))
    torch.manual_seed(0)
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(first, batches(settings, dataset), strict=True))
    chunks = list(dataset.test.chunks(4, 6))
    assert [len(labels) for _, labels in chunks] == [4, 2]
    assert torch.equal(chunks[0][0], dataset.test.take([0, 1, 2, 3]))


def test_chunks_are_the_part_in_its_order():
    part = Part(torch.randint(256, (11, 1, 2, 2), dtype=torch.uint8), torch.arange(11))
    for examples, stop in ((None, 11), (7, 7), (20, 11)):
        images, labels = (torch.cat(parts) for parts in zip(*part.chunks(3, examples), strict=True))
        assert torch.equal(images, part.images[:stop])
        assert torch.equal(labels, part.labels[:stop])


def test_decoders_augment_otherwise_for_each_seed_and_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_images(tmp_path, ["a", "b"], images=20)
    for path in tmp_path.glob("*/*.png"):
        Image.fromarray(torch.randint(256, (80, 80, 3), dtype=torch.uint8).numpy()).save(path)
    dataset = load_dataset(str(tmp_path), Path(), 70)
    monkeypatch.setattr("renorm_lab.training.batches._decoders", lambda device: 1)
    monkeypatch.setattr("renorm_lab.training.batches.batch_sampler", lambda run, train: SameBatch())

    def first(seed: int, start: int) -> torch.Tensor:
        return next(batches(run(steps=9, batch_size=6, augment=True, seed=seed), dataset, start))[0]

    drawn = [first(0, 0), first(1, 0), first(0, 5)]
    assert torch.equal(first(0, 0), drawn[0])
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:])


class SameBatch:
    """The same examples at every step."""

    def __len__(self) -> int:
        return 9

    def set_epoch(self, epoch: int, start_batch: int) -> None:
        pass

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1, 2, 3, 4, 5]] * 9)
