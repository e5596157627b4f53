"""Noise, blur and low contrast at test time: evaluation, example weights, statistics anew, batch statistics.

    pip install --no-build-isolation ".[vision,examples]"
    python examples/shift.py --data cifar100.npz --size 32 --weights FOLDER    # or a folder with train and val

Trains networks with nn.BatchNorm on clean images, and evaluates them on others. Writes shift.csv and shift.png.
Source: Summers & Dinneen 2020, section 3.1, for the example weight; the corruptions are torchvision's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import adjust_contrast

import renorm
from common import picture_text, positive, replace_file, save_csv, spread
from images import SOURCES, check_source, dataset, example_weight, network, pretrain, split, transforms

CORRUPTIONS: dict[str, dict[float, Callable[[Tensor], Tensor]]] = {
    "noise": {sigma: v2.GaussianNoise(sigma=sigma) for sigma in (0.05, 0.1, 0.2)},  # of pixels from 0 to 1
    "blur": {sigma: v2.GaussianBlur(9, sigma) for sigma in (0.5, 1.0, 1.5)},  # in pixels
    "contrast": {factor: partial(adjust_contrast, contrast_factor=factor) for factor in (0.5, 0.25, 0.1)},
}
SEVERITIES = {
    "noise": "standard deviation (pixels from 0 to 1)",
    "blur": "standard deviation in pixels",
    "contrast": "factor",
}
BATCH_SIZES = (2, 32, 200)
EVALUATED = 200  # images of a batch, where it makes no difference
TOLERANCE = 1e-3  # of logits, for a neighbour's influence by rounding
STYLES = {  # label, colour of Okabe and Ito, marker, line
    "plain": ("plain evaluation", "#000000", "o", "-"),
    "weighed": ("example weight, from clean images", "#0072B2", "s", "-"),
    "weighed here": ("example weight, from labels of such images", "#56B4E9", "D", "-"),
    "estimated": ("statistics anew, from such images", "#009E73", "^", "-"),
    "batch 200 mixed": ("batch statistics, 200 images", "#E69F00", "v", "--"),
    "batch 32 sorted": ("batch statistics, 32 images sorted by class", "#CC79A7", "P", ":"),
    "batch 2 mixed": ("batch statistics, 2 images", "#D55E00", "X", "--"),
}

Logits = Callable[[Tensor], Tensor]


class Row(NamedTuple):
    """One way of evaluating one network under one corruption."""

    seed: int
    corruption: str
    severity: float
    method: str
    alpha: float
    accuracy: float  # in %
    neighbour_influence: float  # largest change of an image's logits when the rest of its batch is changed


class Images(NamedTuple):
    """Images (N, 3, H, W), with values from 0 to 1 or as a network takes them, and classes (N,)."""

    x: Tensor
    y: Tensor

    def batches(self, size: int = EVALUATED) -> list[tuple[Tensor, Tensor]]:
        """The images in batches."""
        return list(zip(self.x.split(size), self.y.split(size), strict=True))


@torch.no_grad()
def by_itself(model: nn.Module, x: Tensor) -> Tensor:
    """Logits at evaluation."""
    logits: Tensor = model.eval()(x)
    return logits


@torch.no_grad()
def by_batch(model: nn.Module, x: Tensor) -> Tensor:
    """Logits as in training: normalized by this batch's statistics, while the running ones stay."""
    with renorm.freeze(model):
        logits: Tensor = model.train()(x)
    return logits


def judge(predict: Logits, images: Images, size: int) -> tuple[float, float]:
    """Accuracy in % in batches of a size; and the largest change of an image's logits when its neighbours change."""
    right = [predict(x).argmax(1) == y for x, y in images.batches(size)]
    among = [predict(x)[0] for x in (images.x[:size], torch.cat([images.x[:1], images.x[-size + 1 :]]))]
    return 100 * torch.cat(right).float().mean().item(), (among[0] - among[1]).abs().max().item()


def compare(
    model: nn.Module, weighed: nn.Module, other: Images, test: Images
) -> Iterator[tuple[str, float, float, float]]:
    """Evaluate in every way.

    Args:
        model: trained, with renorm's layers.
        weighed: the same, with the example weight that is best for clean images.
        other: images of the test's corruption, but not the test's. Only "weighed here" looks at their labels.
        test: images to judge by.

    Yields:
        The way's name, the example weight, the accuracy in %, and how much neighbours change an image's logits.
    """
    here = copy.deepcopy(model)
    renorm.weigh(here, other.batches())
    variants = {"plain": model, "weighed": weighed, "weighed here": here}
    variants["estimated"] = renorm.estimate(copy.deepcopy(model), other.batches())
    variants["estimated from one batch"] = renorm.estimate(copy.deepcopy(model), other.batches()[:1])
    for name, variant in variants.items():
        accuracy, change = judge(partial(by_itself, variant), test, EVALUATED)
        if change > TOLERANCE:
            raise RuntimeError(f"{name}: an image's logits changed by {change:g} with its neighbours")
        yield name, example_weight(variant), accuracy, change
    order = test.y.argsort(stable=True)
    for size in BATCH_SIZES:
        for name, images in (("mixed", test), ("sorted", Images(test.x[order], test.y[order]))):
            yield f"batch {size} {name}", 0.0, *judge(partial(by_batch, model), images, size)


def conditions() -> Iterator[tuple[str, float, Callable[[Tensor], Tensor]]]:
    """Name, severity and function of each corruption, and of none."""
    yield "clean", 0.0, lambda x: x
    for name, by_severity in CORRUPTIONS.items():
        for severity, corrupt in by_severity.items():
            yield name, severity, corrupt


class Prepared(NamedTuple):
    """A trained network with renorm's layers, and images to try it on, with values from 0 to 1."""

    model: nn.Module
    other: Images
    test: Images
    standardize: Callable[[Tensor], Tensor]


def prepare(seed: int, args: argparse.Namespace) -> Prepared:
    """Train a network, or read it, and the images that it has not seen."""
    torch.manual_seed(seed)
    data = dataset(args.data, "train")
    model = network(args.model, max(data.targets) + 1, args.size)
    data.transform, evaluation = transforms(model, args.size)
    chosen, held_out = split(data.targets, None, seed=0)
    pretrain(model, data, chosen, args.epochs, seed, args.weights / f"network-{seed}.pt")
    *to_pixels, standardize = evaluation.transforms
    data.transform = v2.Compose(to_pixels)
    other = read(data, held_out, args.images)
    test = dataset(args.data, "test", data.transform)
    test = read(test, torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).tolist(), args.images)
    return Prepared(renorm.convert(model, renorm.BatchNorm), other, test, standardize)


def run(seed: int, args: argparse.Namespace) -> Iterator[Row]:
    """Train a network, and evaluate it under every condition in every way."""
    model, other, test, standardize = prepare(seed, args)
    weighed = copy.deepcopy(model)
    renorm.weigh(weighed, Images(standardize(other.x), other.y).batches())
    for corruption, severity, corrupt in conditions():
        torch.manual_seed(seed)  # of the noise
        shifted = (Images(standardize(corrupt(images.x)), images.y) for images in (other, test))
        for found in compare(model, weighed, *shifted):
            yield Row(seed, corruption, severity, *found)


def read(data: Dataset[tuple[Tensor, int]], indices: list[int], number: int) -> Images:
    """The first images of a data set in an order; an even number, so that no batch has a single one."""
    number = min(number, len(indices)) // 2 * 2
    return Images(*map(torch.cat, zip(*DataLoader(Subset(data, indices[:number]), EVALUATED), strict=True)))


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Draw a panel for each corruption: mean accuracy by severity, and a band from the smallest to the largest."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(picture_text(title))
    for corruption, axes in zip(CORRUPTIONS, figure.subplots(1, len(CORRUPTIONS), sharey=True), strict=True):
        severities = [("clean", 0.0), *((corruption, severity) for severity in CORRUPTIONS[corruption])]
        for name, (label, colour, marker, line) in STYLES.items():
            values = [
                [row.accuracy for row in rows if (row.corruption, row.severity, row.method) == (*severity, name)]
                for severity in severities
            ]
            places = range(len(values))
            axes.plot(places, list(map(mean, values)), line, color=colour, marker=marker, markersize=5, label=label)
            axes.fill_between(
                places, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.12, linewidth=0
            )
        axes.set_xticks(range(len(severities)), ["clean", *(f"{severity:g}" for _, severity in severities[1:])])
        axes.set(title=corruption, xlabel=SEVERITIES[corruption])
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy in %")
    figure.axes[0].set_ylim(0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150, format="png")


def print_table(rows: list[Row]) -> None:
    """Print accuracies, mean and standard deviation over seeds."""
    severities = list(dict.fromkeys((row.corruption, row.severity) for row in rows))
    print("\n" + " " * 24 + "".join(f"{f'{name} {severity:g}':>15}" for name, severity in severities))
    for method in dict.fromkeys(row.method for row in rows):
        cells = (
            spread(
                [row.accuracy for row in rows if (row.corruption, row.severity, row.method) == (*severity, method)], 1
            )
            for severity in severities
        )
        print(f"{method:24}" + "".join(f"{cell:>15}" for cell in cells))


def parsed(description: str) -> argparse.Namespace:
    """The options of an example of trained networks and images unlike those of the training; folders are made."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help=f"images: {SOURCES}")
    parser.add_argument("--model", default="test_resnet", help="a network of timm with batch norm")
    parser.add_argument(
        "--weights", type=Path, required=True, help="folder of the trained networks; those there are used"
    )
    parser.add_argument("--size", type=positive, default=224, help="pixels of an image's side (default: 224)")
    parser.add_argument("--epochs", type=positive, default=8)
    parser.add_argument(
        "--images", type=positive, default=2_000, help="test images, and as many for validation, at most"
    )
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for table, picture")
    args = parser.parse_args()
    check_source(parser, "--data", args.data)
    for folder in (args.out, args.weights):
        folder.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    """Train and evaluate with every seed; files are written anew after each."""
    args = parsed(__doc__.splitlines()[0])
    rows: list[Row] = []
    for seed in range(args.seeds):
        for row in run(seed, args):
            rows.append(row)
            if row.method == "plain":
                print(f"seed {seed}, {row.corruption} {row.severity:g}: plain {row.accuracy:.1f}%", flush=True)
        save_csv(args.out / "shift.csv", Row._fields, rows)
        title = f"{args.model}, trained on clean {args.data.stem} (lines: mean, bands: range, seeds: {seed + 1})"
        replace_file(args.out / "shift.png", partial(draw, rows=rows, title=title))
    print_table(rows)


if __name__ == "__main__":
    main()
