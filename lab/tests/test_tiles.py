"""Segmentation by tiles: scenes, the network's reach, and what tiles of a scene have in common."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import renorm
from renorm_lab.data import Dataset, Part, load_dataset
from renorm_lab.data.dataset import assemble
from renorm_lab.data.scenes import PATCH, SCENE, compose
from renorm_lab.errors import LabError
from renorm_lab.networks.models import build_model
from renorm_lab.networks.network import make_network
from renorm_lab.networks.unet import UNet
from renorm_lab.recipes import RECIPES
from renorm_lab.training.evaluation import set_example_weight
from renorm_lab.training.measures import measure
from renorm_lab.training.objectives import make_scoring, objective
from renorm_lab.training.tiles import by_tiles, cut, foreground_in_empty_tiles, mismatch, stitched

from .test_parts import run

STRIDE = 16


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", Path(), 32)


@pytest.fixture(scope="module")
def scenes(digits: Dataset) -> Dataset:
    return compose(digits, groups=2, scenes=1)


@pytest.fixture
def network(scenes: Dataset) -> UNet:
    """A little trained: its statistics are those of batches of two patches, more or less."""
    model = UNet(1, 3, 4, lambda channels: renorm.Norm(channels, momentum=0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for images, labels in [*scenes.train.chunks(2, 40)]:
        optimizer.zero_grad()
        F.cross_entropy(model(scenes.standardize(images)), labels).backward()
        optimizer.step()
    return model


def test_scenes_are_the_same_every_time_and_those_of_a_part_are_of_its_own_glyphs(digits: Dataset, scenes: Dataset):
    again = compose(digits, groups=2, scenes=1)
    assert torch.equal(again.train.images, scenes.train.images)
    others = compose(replace(digits, test=digits.test.subset(range(100))), groups=2, scenes=1)
    assert torch.equal(others.train.images, scenes.train.images)
    assert torch.equal(others.validation.images, scenes.validation.images)
    assert not torch.equal(others.test.images, scenes.test.images)


def test_scenes_have_crowded_and_empty_places(scenes: Dataset):
    covered = (scenes.train.labels > 0).double().mean((1, 2))
    assert 0.1 < float((covered == 0).double().mean()) < 0.6
    assert covered.max() > 0.2
    assert scenes.image_shape == (1, PATCH, PATCH)
    assert scenes.test.labels.shape == (1, SCENE, SCENE)


def test_glyphs_are_brighter_than_what_is_around_them(scenes: Dataset):
    pixels, labels = scenes.test.images[:, 0].double(), scenes.test.labels
    assert pixels[labels > 0].mean() > pixels[labels == 0].mean() + 20


def test_dark_glyphs_on_bright_images_make_the_same_scenes(digits: Dataset, scenes: Dataset):
    inverted = assemble(
        *(Part(16 - part.images, part.labels) for part in (digits.train, digits.validation, digits.test)), "inverted"
    )
    assert torch.equal(compose(inverted, groups=2, scenes=1).test.labels, scenes.test.labels)


def test_classes_of_glyphs_are_divided_in_their_order(digits: Dataset):
    for groups in (1, 3):
        assert compose(digits, groups, scenes=1).num_classes == groups + 1
    ones = replace(digits, test=digits.test.subset((digits.test.labels == 9).nonzero()[:, 0].tolist()))
    assert compose(ones, groups=5, scenes=1).test.labels.unique().tolist() == [0, 5]
    with pytest.raises(ValueError, match="groups must be at most 10, the classes of digits, got 11"):
        compose(digits, groups=11, scenes=1)


def test_glyphs_fit_into_a_patch():
    part = Part(torch.zeros(4, 1, 70, 70, dtype=torch.uint8), torch.arange(4) % 2)
    with pytest.raises(ValueError, match="image_size must be at most 64, the size of a patch, got images of 70 pixels"):
        compose(assemble(part, part, part, "large"), groups=1, scenes=1)


def reach(model: UNet, row: int, column: int, size: int = 96) -> tuple[int, int]:
    """How far from a pixel outputs depend on it: the largest distance in rows or columns, and the smallest without."""
    x = torch.randn(1, 1, size, size)
    x[0, 0, row, column] = math.nan  # goes wherever there is a path
    changed = model(x)[0, 0].isnan()
    rows, columns = torch.meshgrid(torch.arange(size) - row, torch.arange(size) - column, indexing="ij")
    distance = torch.maximum(rows.abs(), columns.abs())
    untouched = distance[~changed]
    return int(distance[changed].max()), int(untouched.min()) if len(untouched) else size


@torch.no_grad()
def test_no_output_depends_on_a_pixel_beyond_the_margin_and_some_on_one_at_it():
    model = UNet(1, 2, 4, renorm.Norm).eval()
    reached = [reach(model, 44 + row, 44 + column)[0] for row in range(model.step) for column in range(model.step)]
    assert max(reached) == model.margin == 20
    set_example_weight(model, 1.0)
    assert reach(model, 44, 44)[1] == 96, "by its own statistics every output depends on every pixel"


def test_outputs_shift_along_by_a_step(network: UNet):
    network.eval()
    x = torch.randn(1, 1, 96, 96)
    inside = slice(network.margin + 8, 96 - network.margin - 8)
    outputs = {shift: network(x.roll((shift, shift), (2, 3))).roll((-shift, -shift), (2, 3)) for shift in (0, 2, 4, 8)}
    for shift in (4, 8):
        torch.testing.assert_close(outputs[shift][..., inside, inside], outputs[0][..., inside, inside])
    assert not torch.allclose(outputs[2][..., inside, inside], outputs[0][..., inside, inside])


def test_whole_images_come_out_of_their_tiles():
    images = torch.randn(2, 3, 112, 128)
    assert cut(images, 64, 16).shape == (2, 4, 5, 3, 64, 64)
    assert torch.equal(cut(images, 64, 16)[1, 2, 3], images[1, :, 32:96, 48:112])
    torch.testing.assert_close(stitched(cut(images, 64, 16), 16), images)
    assert cut(images[:, 0], 64, 16).shape == (2, 4, 5, 64, 64)


def test_tiles_are_predicted_where_they_lie():
    images = torch.randn(2, 3, 96, 96)
    predicted = by_tiles(nn.Identity(), images, 64, 16, batch_size=5)
    torch.testing.assert_close(predicted, cut(images.softmax(1), 64, 16))


def test_stitching_is_that_of_monai(network: UNet, scenes: Dataset):
    inferers = pytest.importorskip("monai.inferers")
    network.eval()
    images = scenes.standardize(scenes.test.images)
    with torch.no_grad():
        theirs = inferers.sliding_window_inference(
            images, (64, 64), 4, lambda tiles: network(tiles).softmax(1), overlap=0.25
        )
        torch.testing.assert_close(stitched(by_tiles(network, images, 64, 48, 7), 48), theirs)


def test_mismatch_is_the_difference_of_two_tiles_beyond_the_margin():
    predicted = torch.rand(1, 2, 3, 2, 12, 12).softmax(3)
    distances, differing = [], []
    for row in range(2):
        for column in range(3):
            for down, right in ((1, 0), (0, 1)):
                if row + down > 1 or column + right > 2:
                    continue
                for y in range(12):
                    for x in range(12):
                        places = (y, x), (y - 4 * down, x - 4 * right)
                        if not all(2 <= value < 10 for place in places for value in place):
                            continue
                        one = predicted[0, row, column, :, y, x]
                        other = predicted[0, row + down, column + right, :, places[1][0], places[1][1]]
                        distances.append(float((one - other).abs().sum()) / 2)
                        differing.append(bool(one.argmax() != other.argmax()))
    found = mismatch(predicted, stride=4, margin=2)
    assert found.probability == pytest.approx(sum(distances) / len(distances))
    assert found.labels == pytest.approx(sum(differing) / len(differing))
    with pytest.raises(ValueError, match="tiles must overlap by more than 8 pixels, got 8"):
        mismatch(predicted, stride=4, margin=4)


@torch.no_grad()
def test_tiles_agree_by_running_statistics_and_disagree_by_their_own(network: UNet, scenes: Dataset):
    images = scenes.standardize(scenes.test.images)

    def found() -> float:
        return mismatch(by_tiles(network, images, PATCH, STRIDE, 2), STRIDE, network.margin).probability

    network.eval()
    assert found() < 1e-6
    set_example_weight(network, 1.0)
    assert found() > 1e-3
    set_example_weight(network, 0.0)
    network.train()
    with renorm.freeze(network):
        assert found() > 1e-3


def test_foreground_counts_in_empty_tiles_alone():
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, 0, 0] = 1
    predicted = torch.zeros(1, 2, 2, 2, 4, 4)
    predicted[:, :, :, 0] = 1.0
    predicted[0, 0, 0] = predicted[0, 0, 0].flip(0)  # where there is something
    assert foreground_in_empty_tiles(predicted, labels, 4) == 0
    predicted[0, 1, 1, :, 0] = predicted[0, 1, 1, :, 0].flip(0)
    assert foreground_in_empty_tiles(predicted, labels, 4) == pytest.approx(4 / 48)
    assert foreground_in_empty_tiles(predicted, labels + 1, 4) == 0


def dice(found: Tensor, labels: Tensor, label: int) -> float:
    both = ((found == label) & (labels == label)).sum()
    return float(2 * both / ((found == label).sum() + (labels == label).sum()))


def test_segmentation_is_scored_by_dice_over_all_pixels():
    logits, labels = torch.randn(5, 3, 8, 8), torch.randint(3, (5, 8, 8))
    setting = run(objective="segmentation")
    scoring = make_scoring(setting)
    for part in (slice(0, 2), slice(2, 5)):
        scoring.add(logits[part], labels[part])
    found = logits.argmax(1)
    expected = sum(dice(found, labels, label) for label in (1, 2)) / 2
    assert scoring.score().accuracy == pytest.approx(expected)
    assert scoring.score().loss == pytest.approx(float(objective(setting)(logits, labels)), rel=1e-5)


def test_measures_of_tiles_leave_the_network_as_it_was(network: UNet, scenes: Dataset):
    state = {key: value.clone() for key, value in network.state_dict().items()}
    for alpha in (0.0, 1.0):
        setting = run(measures="tiles", objective="segmentation", example_weight=alpha, batch_size=2)
        found = dict(measure(setting, network, scenes))
        assert len(found) == 8
        assert all(0 <= value <= 1 for value in found.values())
        assert (found["mismatch"] < 1e-6) == (alpha == 0)
        assert found["mismatch, training mode"] > 1e-3
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert {module.training for module in network.modules()} == {True}
    assert {layer.example_weight for layer in network.modules() if isinstance(layer, renorm.Norm)} == {0.0}


def test_with_one_patch_a_batch_batch_norm_is_instance_norm_in_training(scenes: Dataset):
    recipe = RECIPES["tiles"](seeds=1, batch_sizes=(1,), methods=("batch_norm", "instance_norm"), frozen_shares=())
    runs = recipe.runs(scenes)
    assert [(run.examples_per_group, run.example_weight) for run in runs] == [(None, 0.0), (1, 1.0)]
    outputs = []
    for setting in runs:
        torch.manual_seed(0)
        outputs.append(make_network(setting, scenes)(scenes.standardize(scenes.train.images[:1])))
    torch.testing.assert_close(*outputs)


def test_late_freezes_are_rows_of_batch_norm(scenes: Dataset):
    runs = RECIPES["tiles"](seeds=1, batch_sizes=(2,)).runs(scenes)
    frozen = {run.method: run.frozen_share for run in runs if run.frozen_share}
    assert frozen == {"batch norm, frozen for the last 10%": 0.1, "batch norm, frozen for the last 50%": 0.5}


def test_a_network_for_classes_does_not_segment(scenes: Dataset):
    for model, goal in (("resnet8", "segmentation"), ("unet8", "classification")):
        with pytest.raises(
            ValueError, match=f"model must be unetN for segmentation, and for nothing else, got {model}"
        ):
            make_network(run(model=model, objective=goal), scenes)
    with pytest.raises(ValueError, match=r"model must be mlp, resnet18, .*, unetN, .* got unet0"):
        build_model("unet0", (1, 64, 64), 2, renorm.Norm)


def test_images_are_not_flipped_without_their_labels():
    with pytest.raises(LabError, match="augment cannot be true in recipe tiles"):
        RECIPES["tiles"](augment=True).load()
    with pytest.raises(LabError, match="groups must be at most 10"):
        RECIPES["tiles"](groups=20).load()
