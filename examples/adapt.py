"""A stream of images unlike those of the training: statistics that follow it, against those of a batch and Tent.

    pip install --no-build-isolation ".[vision,examples]"
    python examples/adapt.py --data cifar100.npz --size 32 --weights FOLDER    # the networks of shift.py, if there

Writes adapt.csv and adapt.png.
Source: Zhao, Chen & Xia 2023 (DELTA), for statistics that follow; Wang et al. 2021 (Tent), for entropy.
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

import renorm
from common import descend, picture_text, replace_file, save_csv, spread
from shift import CORRUPTIONS, EVALUATED, Images, by_batch, by_itself, parsed, prepare

BATCH = 32
MOMENTUM = 0.05  # of a batch of 32; of others in proportion
CONDITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": lambda x: x,
    "noise 0.1": CORRUPTIONS["noise"][0.1],
    "blur 1.5": CORRUPTIONS["blur"][1.5],
    "contrast 0.25": CORRUPTIONS["contrast"][0.25],
}
CHANGING = "one after the other"
STYLES = {  # label, colour of Okabe and Ito
    "plain": ("plain evaluation", "#000000"),
    "estimated": ("statistics anew, beforehand", "#009E73"),
    "batch": ("batch statistics", "#E69F00"),
    "tent": ("Tent", "#CC79A7"),
    "adapt": ("renorm.adapt", "#0072B2"),
    "adapt, single images": ("renorm.adapt, one by one", "#56B4E9"),
}

Predict = Callable[[nn.Module, Tensor], Tensor]


class Row(NamedTuple):
    """One way of evaluating one network on one stream."""

    seed: int
    condition: str
    order: str
    method: str
    accuracy: float  # in %


@torch.no_grad()
def follow(model: nn.Module, x: Tensor, size: int) -> Tensor:
    """Logits of a stream in batches, by statistics that follow it."""
    with renorm.adapt(model, momentum=MOMENTUM * size / BATCH):
        return torch.cat([model(batch) for batch in x.split(size)])


def tent(model: nn.Module, x: Tensor, rate: float) -> Tensor:
    """Logits by the statistics of the batch; each batch then lowers their entropy, by the norm layers' weights."""
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if isinstance(module, renorm.Norm)]
    model.requires_grad_(False)
    parameters = [parameter.requires_grad_() for layer in layers for parameter in (layer.weight, layer.bias)]
    optimizer = torch.optim.Adam(parameters, rate)
    found = []
    with renorm.freeze(model):
        for batch in x.split(BATCH):
            logits = model.train()(batch)
            descend(optimizer, -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean())
            found.append(logits.detach())
    return torch.cat(found)


def by_neighbours(model: nn.Module, x: Tensor) -> Tensor:
    """Logits by the statistics of each batch."""
    return torch.cat([by_batch(model, batch) for batch in x.split(BATCH)])


def beforehand(other: Tensor) -> Predict:
    """By statistics of other images of the same kind."""
    return lambda model, x: by_itself(renorm.estimate(copy.deepcopy(model), other.split(EVALUATED)), x)


def streams(images: Images, standardize: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each condition's images, and quarters of them in turn."""
    shifted = {name: standardize(corrupt(images.x)) for name, corrupt in CONDITIONS.items()}
    yield from shifted.items()
    yield CHANGING, torch.cat([x.chunk(4)[i] for i, x in enumerate(shifted.values())])


def run(seed: int, args: argparse.Namespace) -> Iterator[Row]:
    """Train a network, or read it, and evaluate it on every stream in every way."""
    model, other, test, standardize = prepare(seed, args)
    # the stream that changes has its classes in order within each quarter
    places = torch.arange(len(test.y)).chunk(4)
    in_quarters = torch.cat([part[test.y[part].argsort(stable=True)] for part in places])
    for order in ("mixed", "sorted by class"):
        torch.manual_seed(seed)  # of the noise
        for (condition, x), (_, unlabelled) in zip(
            streams(test, standardize), streams(other, standardize), strict=True
        ):
            y = test.y
            if order != "mixed":
                places_now = in_quarters if condition == CHANGING else test.y.argsort(stable=True)
                x, y = x[places_now], y[places_now]
            ways: dict[str, Predict] = {
                "plain": by_itself,
                "estimated": beforehand(unlabelled),
                "batch": by_neighbours,
                "tent": partial(tent, rate=1e-3),
                "tent, slow": partial(tent, rate=1e-4),
                "adapt": partial(follow, size=BATCH),
                "adapt, single images": partial(follow, size=1),
            }
            for method, predict in ways.items():
                right = predict(model, x).argmax(1) == y
                yield Row(seed, condition, order, method, 100 * right.double().mean().item())


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Draw a panel for each order: mean accuracy of each way on each stream, and its range over seeds."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(picture_text(title))
    conditions = [*CONDITIONS, CHANGING]
    width = 0.8 / len(STYLES)
    for order, axes in zip(("mixed", "sorted by class"), figure.subplots(1, 2, sharey=True), strict=True):
        for number, (method, (label, colour)) in enumerate(STYLES.items()):
            values = [
                [row.accuracy for row in rows if (row.condition, row.order, row.method) == (condition, order, method)]
                for condition in conditions
            ]
            means = [mean(v) for v in values]
            ends = [[m - min(v) for m, v in zip(means, values, strict=True)],
                    [max(v) - m for m, v in zip(means, values, strict=True)]]  # fmt: skip
            at = [place + (number - (len(STYLES) - 1) / 2) * width for place in range(len(conditions))]
            axes.bar(at, means, width, yerr=ends, color=colour, label=label, error_kw={"linewidth": 0.8})
        axes.set_xticks(range(len(conditions)), [name.replace(" after", "\nafter") for name in conditions])
        axes.set_title(f"stream {order}")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel("test accuracy in %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    replace_file(path, partial(figure.savefig, dpi=150, format="png"))


def print_table(rows: list[Row]) -> None:
    """Print accuracies, mean and standard deviation over seeds."""
    for order in dict.fromkeys(row.order for row in rows):
        print(f"\n{order:24}" + "".join(f"{name:>22}" for name in [*CONDITIONS, CHANGING]))
        for method in dict.fromkeys(row.method for row in rows):
            cells = (
                [row.accuracy for row in rows if (row.condition, row.order, row.method) == (condition, order, method)]
                for condition in [*CONDITIONS, CHANGING]
            )
            print(f"{method:24}" + "".join(f"{spread(cell, 1):>22}" for cell in cells))


def main() -> None:
    """Evaluate every network; files are written anew after each."""
    args = parsed((__doc__ or "").splitlines()[0])
    rows: list[Row] = []
    for seed in range(args.seeds):
        rows += run(seed, args)
        save_csv(args.out / "adapt.csv", Row._fields, rows)
        title = f"{args.model}, trained on clean {args.data.stem} (means and ranges over {seed + 1} seeds)"
        draw(args.out / "adapt.png", rows, title)
    print_table(rows)


if __name__ == "__main__":
    main()
