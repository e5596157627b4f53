"""Data sets whose parts have other classes, and those that have a layout and a split of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from renorm_lab.data import load_dataset
from renorm_lab.data.classes import load_unseen, set_aside
from renorm_lab.errors import LabError

from .conftest import arrays


def labels_of(part) -> set[int]:
    return set(part.labels.tolist())


def test_digits_are_split_by_class():
    dataset = load_unseen("digits", Path(), 32)
    assert (labels_of(dataset.train), dataset.num_classes) == (set(range(5)), 5)
    assert len(labels_of(dataset.validation)) == 2
    assert len(labels_of(dataset.test)) == 3
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 1_797
    images = [{image.numpy().tobytes() for image in part.images} for part in (dataset.train, dataset.validation)]
    assert not images[0] & images[1]
    again = load_unseen("digits", Path(), 32)
    assert torch.equal(again.test.images, dataset.test.images)


def test_a_file_with_unseen_test_classes_stays_as_it_is(tmp_path: Path):
    data = arrays(classes=10)
    np.savez(tmp_path / "unseen.npz", **(data | {"y_test": data["y_test"] + 10}))
    dataset = load_unseen(str(tmp_path / "unseen.npz"), Path(), 32)
    assert dataset.num_classes == 8
    assert len(labels_of(dataset.validation)) == 2
    assert labels_of(dataset.test) == set(range(10, 20))
    assert len(dataset.test) == len(data["x_test"])


def test_what_cannot_be_split_by_class_is_refused(tmp_path: Path):
    np.savez(tmp_path / "few.npz", **arrays(classes=3))
    with pytest.raises(LabError, match=r"few\.npz: must have at least 4 classes to split them, has 3"):
        load_unseen(str(tmp_path / "few.npz"), Path(), 32)
    for source in (str(tmp_path), "cub2011"):
        with pytest.raises(LabError, match=f"{source}: classes of a folder of images cannot be split; .* omniglot"):
            load_unseen(source, Path(), 32)
    with pytest.raises(LabError, match=r"no\.npz: there is no such file"):
        load_unseen("no.npz", Path(), 32)


def test_the_first_classes_alone_are_kept():
    everything = load_dataset("digits", Path(), 8)
    dataset = everything.first_classes(3)
    assert [labels_of(part) for part in (dataset.train, dataset.validation, dataset.test)] == [set(range(3))] * 3
    assert len(dataset.test) == int((everything.test.labels < 3).sum())
    assert dataset.standardize(dataset.train.images).mean().abs() < 1e-5
    with pytest.raises(LabError, match="digits: has 10 classes, fewer than classes=11"):
        everything.first_classes(11)


def test_classes_are_set_aside_for_pretraining():
    dataset = set_aside(load_dataset("digits", Path(), 8), True, 20)
    assert [labels_of(part) for part in (dataset.train, dataset.validation, dataset.test)] == [set(range(5))] * 3
    assert labels_of(dataset.pretraining) == set(range(5))
    assert len(dataset.train) == 100
    assert len(dataset.pretraining) > 400
    with pytest.raises(LabError, match=r"digits: a class has .* training images, fewer than examples_per_class=200"):
        set_aside(load_dataset("digits", Path(), 8), True, 200)


def test_too_few_classes_are_not_set_aside(tmp_path: Path):
    np.savez(tmp_path / "one.npz", **arrays(classes=1))
    with pytest.raises(LabError, match=r"one\.npz: must have at least 4 classes to split them, has 1"):
        set_aside(load_dataset(str(tmp_path / "one.npz"), Path(), 8), True, None)


def test_nothing_is_set_aside_for_downloaded_weights():
    digits = load_dataset("digits", Path(), 8)
    assert set_aside(digits, False, None) is digits


def save(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (shade % 256, 0, 0)).save(path)


def test_imagenet_is_read_as_laid_out(tmp_path: Path):
    for part, count in (("train", 10), ("val", 3)):
        for name in ("n01440764", "n01443537"):
            for index in range(count):
                save(tmp_path / "imagenet" / part / name / f"{index}.JPEG", index)
    dataset = load_dataset("imagenet", tmp_path, 16)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [16, 4, 6]
    with pytest.raises(LabError, match="imagenet: there is no such folder"):
        load_dataset("imagenet", tmp_path / "elsewhere", 16)


def test_caltech256_has_the_papers_split_without_clutter(tmp_path: Path):
    folder = tmp_path / "caltech256" / "256_ObjectCategories"
    for name in ("001.ak47", "002.american-flag", "257.clutter"):
        for index in range(82):
            save(folder / name / f"{name[:3]}_{index:04d}.jpg", index)
    dataset = load_dataset("caltech-256", tmp_path, 8)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [80, 20, 60]
    assert dataset.num_classes == 2
    assert torch.equal(load_dataset("caltech256", tmp_path, 8).test.images, dataset.test.images)
    for index in range(3):
        (folder / "001.ak47" / f"001_{index:04d}.jpg").unlink()
    with pytest.raises(LabError, match=r"001\.ak47: must have at least 80 images, has 79"):
        load_dataset("caltech256", tmp_path, 8)


def test_flowers102_has_its_own_parts(tmp_path: Path):
    from scipy.io import savemat

    folder = tmp_path / "flowers-102"
    for number in range(1, 13):
        save(folder / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": [[1 + number % 2 for number in range(12)]]})
    savemat(folder / "setid.mat", {"trnid": [[1, 2, 3, 4]], "valid": [[5, 6]], "tstid": [[7, 8, 9, 10, 11, 12]]})
    dataset = load_dataset("flowers102", tmp_path, 8)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [4, 2, 6]
    assert dataset.validation.labels.tolist() == [0, 1]
    (folder / "jpg" / "image_00007.jpg").unlink()
    with pytest.raises(LabError, match=r"image_00007\.jpg: there is no such file"):
        load_dataset("flowers102", tmp_path, 8)
    with pytest.raises(LabError, match=r"flowers-102: .*imagelabels"):
        load_dataset("flowers102", tmp_path / "elsewhere", 8)


def test_cub2011_holds_a_quarter_back_for_validation(tmp_path: Path):
    folder = tmp_path / "CUB_200_2011"
    rows = [
        (number, f"{1 + number % 2:03d}.Bird/{number}.jpg", 1 + number % 2, int(number < 16)) for number in range(24)
    ]
    for number, name, _, _ in rows:
        save(folder / "images" / name, number)
    for name, column in (("images", 1), ("image_class_labels", 2), ("train_test_split", 3)):
        (folder / f"{name}.txt").write_text("".join(f"{row[0] + 1} {row[column]}\n" for row in rows))
    dataset = load_dataset("cub2011", tmp_path, 8)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [12, 4, 8]
    with pytest.raises(LabError, match=r"CUB_200_2011: .*images"):
        load_dataset("cub2011", tmp_path / "elsewhere", 8)


def test_large_image_that_is_none_is_named_before_training(tmp_path: Path):
    for name in ("a", "b"):
        for index in range(8):
            save(tmp_path / name / f"{index}.png", index)
    (tmp_path / "a" / "3.png").write_bytes(b"nothing")
    with pytest.raises(LabError, match=r"3\.png: cannot identify"):
        load_dataset(str(tmp_path), Path(), 100)
