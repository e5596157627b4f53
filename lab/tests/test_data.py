"""Data: every source gives the same kind of thing, and every mistake one line that names the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from renorm_lab.data import Part, load_dataset
from renorm_lab.data.hidden import hidden
from renorm_lab.data.image_files import ImageFiles
from renorm_lab.errors import LabError

from .conftest import arrays


def load(source: Path | str):
    return load_dataset(str(source), Path("nowhere"), 16)


def test_digits_come_without_a_file_in_three_stratified_parts():
    dataset = load("digits")
    assert dataset.image_shape == (1, 8, 8)
    assert dataset.num_classes == 10
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [1077, 270, 450]
    for part in (dataset.train, dataset.validation, dataset.test):
        counts = part.labels.bincount()
        assert counts.max() - counts.min() <= 0.1 * counts.max()


def test_parts_share_no_image_and_are_the_same_every_time():
    first, second = load("digits"), load("digits")
    assert torch.equal(first.validation.images, second.validation.images)
    train = {image.numpy().tobytes() for image in first.train.images}
    held_out = {image.numpy().tobytes() for part in (first.validation, first.test) for image in part.images}
    assert not train & held_out


def test_training_images_are_standardized_by_channel():
    dataset = load("digits")
    x = dataset.standardize(dataset.train.images)
    assert x.mean() == pytest.approx(0, abs=1e-4)
    assert x.std() == pytest.approx(1, abs=1e-3)


def test_npz(npz: Path):
    dataset = load(npz)
    assert dataset.image_shape == (1, 8, 8)
    assert len(dataset.train) == 64
    assert len(dataset.validation) == 16


@pytest.mark.parametrize("shape", [(32, 32), (32, 48)])
def test_larger_images_are_shrunk(shape: tuple[int, int], tmp_path: Path):
    height, width = shape
    ramp = np.broadcast_to(np.linspace(0, 255, height)[None, :, None, None], (80, height, width, 3)).astype(np.uint8)
    images = arrays() | {"x_train": ramp, "x_test": ramp[::2]}
    np.savez(tmp_path / "large.npz", **images)
    dataset = load(tmp_path / "large.npz")
    assert dataset.image_shape == (3, 16, 16)
    rows = dataset.train.images[0, 0].float()
    assert torch.allclose(rows[1:-1].mean(1), torch.linspace(0, 255, 32).view(16, 2).mean(1)[1:-1], atol=1.5)
    assert rows.std(1).max() == 0  # across a row nothing changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((80, 8, 8), np.uint8)}, r"x_train must be uint8 of shape \(N, H, W, C\)"),
        ({"x_test": np.zeros((40, 8, 8, 1))}, "x_test must be uint8 .* got float64"),
        ({"x_test": np.zeros((40, 9, 9, 1), np.uint8)}, "must have one shape"),
        ({"y_train": np.zeros(3, int)}, r"y_train must be integers of shape \(80,\)"),
        ({"y_test": np.full(40, 7)}, "y_test has labels out of range: from 7 to 7, .* allow 0 to 3"),
        ({"y_train": np.full(80, -1)}, "y_train has labels out of range"),
        ({"y_train": np.repeat([0, 1, 3, 3], 20)}, "class 2 has no training image"),
        ({"y_train": np.repeat([0, 1, 2, 3], [1, 39, 20, 20])}, "cannot split off a validation part"),
    ],
)
def test_npz_with_a_mistake_is_refused(tmp_path: Path, changes: dict, message: str):
    path = tmp_path / "bad.npz"
    np.savez(path, **(arrays() | changes))
    with pytest.raises(LabError, match=rf"bad\.npz: .*{message}"):
        load(path)


def test_npz_that_lacks_an_array_or_is_none_is_refused(tmp_path: Path):
    path = tmp_path / "bad.npz"
    np.savez(path, x_train=np.zeros(3))
    with pytest.raises(LabError, match=r"bad\.npz: .*y_train"):
        load(path)
    path.write_bytes(b"not a zip file")
    with pytest.raises(LabError, match=r"bad\.npz: cannot be read"):
        load(path)


@pytest.mark.parametrize("source", ["missing.npz", "missing/", "cifar1000"])
def test_what_is_not_there_is_named(source: str):
    with pytest.raises(LabError, match=f"{source}: there is no such file"):
        load(source)


def save_images(folder: Path, classes: list[str], images: int = 8) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(images):
            Image.new("RGB", (20 + index, 24), (40 * number, index, 0)).save(folder / name / f"{index}.png")


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folder_with_two_parts(tmp_path: Path, test: str):
    save_images(tmp_path / "train", ["a", "b"])
    save_images(tmp_path / test, ["a", "b"], images=2)
    dataset = load(tmp_path)
    assert dataset.image_shape == (3, 16, 16)
    assert len(dataset.test) == 4


def test_image_folder_of_classes_is_split(tmp_path: Path):
    save_images(tmp_path, ["a", "b", "c"])
    dataset = load(tmp_path)
    assert dataset.num_classes == 3
    assert len(dataset.test) == 6


def test_image_folder_with_a_mistake_is_refused(tmp_path: Path):
    save_images(tmp_path / "train", ["a", "b"])
    with pytest.raises(LabError, match="neither test nor val"):
        load(tmp_path)
    save_images(tmp_path / "test", ["a", "c"])
    with pytest.raises(LabError, match="class b is not in both"):
        load(tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(LabError, match="no valid file for the classes empty"):
        load(tmp_path)


def test_unreadable_image_is_named(tmp_path: Path):
    save_images(tmp_path, ["a", "b"])
    (tmp_path / "a" / "0.png").write_bytes(b"nothing")
    with pytest.raises(LabError, match=r"0\.png"):
        load(tmp_path)


@pytest.mark.parametrize("size", [16, 128])  # in memory, and in their files
def test_all_unreadable_images_are_named_at_once_up_to_a_number(size: int, tmp_path: Path):
    save_images(tmp_path / "train", ["a", "b"], images=30)
    save_images(tmp_path / "test", ["a", "b"])
    bad = [tmp_path / "train" / "a" / f"{index}.png" for index in range(18)] + [tmp_path / "test" / "b" / "0.png"]
    for path in bad:
        path.write_bytes(b"nothing")
    with pytest.raises(LabError) as raised:
        load_dataset(str(tmp_path), Path("nowhere"), size)
    first, *lines = str(raised.value).splitlines()
    assert first == "19 images cannot be read:"
    assert {line.strip().partition(": ")[0] for line in lines} == {str(path) for path in bad}
    for path in (tmp_path / "train" / "b").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(LabError, match="49 images cannot be read:") as raised:
        load_dataset(str(tmp_path), Path("nowhere"), size)
    assert str(raised.value).splitlines()[-1] == "  and 29 more"
    assert len(str(raised.value).splitlines()) == 22


def test_a_hidden_centre_is_known_by_its_colour_alone():
    dataset = load("digits")
    found = hidden(dataset)
    for part, before in ((found.train, dataset.train), (found.test, dataset.test)):
        colours = dataset.standardize(before.images)[:, :, 2:6, 2:6].mean((2, 3))
        torch.testing.assert_close(part.labels, colours, rtol=1e-4, atol=1e-4)
        assert dataset.standardize(part.images)[:, :, 2:6, 2:6].abs().max() < 0.1
        assert torch.equal(part.images[:, :, :2], before.images[:, :, :2])
    assert not torch.equal(dataset.train.images, found.train.images)  # which stayed as they were


def test_images_that_stay_in_their_files_are_not_hidden_in_part():
    part = Part(ImageFiles([Path("a.png")], 100), torch.zeros(1, dtype=torch.long))
    known = load("digits")
    with pytest.raises(LabError, match="digits: images that stay in their files cannot be hidden in part: image_size"):
        hidden(replace(known, train=part))
