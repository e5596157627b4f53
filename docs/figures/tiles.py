"""Trains three networks for a minute and draws the picture of tiled inference: python docs/figures/tiles.py"""

from __future__ import annotations

import csv
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from renorm_lab.data import Dataset
from renorm_lab.networks.unet import UNet
from renorm_lab.recipes.tiles import Tiles
from renorm_lab.runs import Run
from renorm_lab.training.evaluation import set_example_weight
from renorm_lab.training.tiles import by_tiles, stitched
from renorm_lab.training.train import Training

HERE = Path(__file__).parent
METHODS = ("instance_norm", "batch_norm", "batch_renorm")
SCENE = 2  # of the test, with crowded and empty places
BRIGHTEST = 170  # what is drawn white
MOST = 0.25  # standard deviation that is drawn black
SPREAD = colormaps["gray_r"].with_extremes(bad="#cfe2f3")


@torch.no_grad()
def look(model: UNet, image: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The probability of foreground from tiles, and how much it varies with the tile that a pixel is seen in.

    Args:
        model: in evaluation mode.
        image: (1, 1, H, W).
        size: height and width of a tile.

    Returns:
        (H, W), and (H, W) with NaN where fewer than two tiles see a pixel beyond their margin.
    """
    probability = stitched(by_tiles(model, image, size, 3 * size // 4, 25), 3 * size // 4)[0, 1]
    predicted = by_tiles(model, image, size, model.step, 100)[:, :, :, 1:]
    seen = torch.zeros_like(predicted)
    seen[..., model.margin : -model.margin, model.margin : -model.margin] = 1
    count, total, squares = (_added(part, model.step) for part in (seen, seen * predicted, seen * predicted**2))
    spread = (squares / count - (total / count) ** 2).clamp(min=0).sqrt()
    return probability, spread.masked_fill(count < 2, torch.nan)


def _added(tiles: Tensor, stride: int) -> Tensor:
    height, width = ((number - 1) * stride + tiles.shape[-1] for number in tiles.shape[1:3])
    columns = tiles.double().flatten(1, 2).flatten(2).transpose(1, 2)
    return F.fold(columns, (height, width), tiles.shape[-1], stride=stride)[0, 0]


def train(run: Run, dataset: Dataset, recipe: Tiles) -> UNet:
    """A trained network, in evaluation mode.

    Args:
        run: the run.
        dataset: what it is trained on.
        recipe: how.

    Returns:
        The network.
    """
    training = Training(run, dataset, recipe)
    training.finish(lambda step: None)
    model = training.trained.eval()
    assert isinstance(model, UNet)
    set_example_weight(model, run.example_weight)
    return model


def draw() -> tuple[Figure, list[list[str]]]:
    """The scene, its truth, and for each method what it says by tiles and where its tiles disagree.

    Returns:
        The figure, and its numbers as lines of a table.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 1 + len(METHODS))
    lines = [["method", "Dice by tiles", "mean standard deviation over tiles"]]
    with TemporaryDirectory() as folder:
        recipe = Tiles(methods=METHODS, frozen_shares=(), batch_sizes=(1,), seeds=1, logger="none", out=Path(folder))
        dataset = recipe.load()
        pixels, labels = dataset.test.take([SCENE]), dataset.test.labels[SCENE]
        panels[0, 0].imshow(pixels[0, 0], cmap="gray", vmin=0, vmax=BRIGHTEST)
        panels[1, 0].imshow(labels, cmap="gray")
        panels[0, 0].set_title("scene")
        panels[1, 0].set_title("truth")
        for run, (above, below) in zip(recipe.runs(dataset), panels[:, 1:].T, strict=True):
            model = train(run, dataset, recipe)
            probability, spread = look(model, dataset.standardize(pixels), dataset.image_shape[1])
            found = probability > 0.5
            dice = float(2 * (found & (labels > 0)).sum() / (found.sum() + (labels > 0).sum()))
            mean = float(spread[~spread.isnan()].mean())
            above.imshow(probability, cmap="gray", vmin=0, vmax=1)
            above.set_title(f"{run.method}:\nDice {100 * dice:.0f}%")
            shown = below.imshow(spread, cmap=SPREAD, vmin=0, vmax=MOST)
            below.set_title(f"its tiles differ by {100 * mean:.1f}%")
            lines.append([run.method, f"{dice:.4f}", f"{mean:.6f}"])
    figure.colorbar(shown, ax=panels[:, -1], label="standard deviation over tiles", shrink=0.5)
    panels[1, 0].set_xlabel("blue: no two tiles see it\nbeyond their margins")
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    return figure, lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    picture, table = draw()
    picture.savefig(HERE / "tiles.png", dpi=90)
    with (HERE / "tiles.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
