"""The example weight without labels: what weigh wins back by training mode's own classes, and by other ways to choose.

    pip install --no-build-isolation ".[vision,examples]"
    python examples/unlabelled.py                                          # digits, 3 seeds
    python examples/unlabelled.py --data cifar100.npz --steps 1600         # 20 of its classes, in 16 x 16

Networks with batch norm are trained where evaluation suffers, and where it does not: on workers of one class each, on
batches of few classes, and on independent batches of 2, 4 and 32. Each is weighed on validation data in every way,
and judged on test data. Writes unlabelled-DATA.csv and unlabelled-DATA.png.
Source: Singh & Shrivastava 2019 (EvalNorm); Summers & Dinneen 2020, section 3.1.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import renorm
from common import picture_text, positive, replace_file, save_csv
from renorm.samplers import ClassBatchSampler
from trained import BATCH, Images, accuracy, batches, load, network, train

CLASSES, FIRST_SEED = 20, 10  # the way that weigh has was chosen on other seeds
FEW = {10: 2, CLASSES: 4}  # classes of a batch of 32, by those of the data
SHARED = {"workers": 4, "few classes": BATCH, "independent, 2": 2, "independent, 4": 4, "independent, 32": BATCH}
GRID = [i / 50 for i in range(51)]
WAYS = {  # with colours of Okabe and Ito's
    "as trained": "#000000", "by labels": "#0072B2", "by training mode": "#D55E00",
    "by training mode, shuffled": "#E69F00", "by moments": "#009E73", "1 / n": "#CC79A7",
}  # fmt: skip

Batches = list[tuple[Tensor, Tensor]]


class Row(NamedTuple):
    """A trained network, weighed in a way."""

    regime: str
    seed: int
    way: str
    alpha: float  # the mean over layers
    is_noise: bool  # whether weigh left the model as it was
    test_accuracy: float  # in %
    test_loss: float


def parts_of(source: str) -> list[Images]:
    """Training, validation and test images: digits, or the first classes of colour images in half their size."""
    parts = load(source)
    if parts[0].x.shape[1] == 1:
        return list(parts)
    return [Images(avg_pool2d(part.x[part.y < CLASSES], 2), part.y[part.y < CLASSES]) for part in parts]


def given(data: Images, regime: str, seed: int, *, shuffled: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of a regime, those of all workers one after the other; or of its size, shuffled."""
    classes = int(data.y.max()) + 1
    if regime != "workers" or shuffled:
        kind = "few classes" if regime == "few classes" and not shuffled else "independent"
        yield from batches(data, kind, FEW[classes], seed)
    sampler = ClassBatchSampler(data.y, classes, SHARED[regime], order="class", seed=seed)
    for epoch in count():
        sampler.set_epoch(epoch)
        for chosen in sampler:
            yield data.x[chosen], data.y[chosen]


def plain8(data: Images) -> nn.Module:
    """Seven convolutions without shortcuts, the network of the lab's recipe of workers."""
    layers: list[nn.Module] = []
    for before, after in pairwise([data.x.shape[1], 16, 16, 16, 32, 32, 64, 64]):
        stride = 2 if 16 <= before < after else 1
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, int(data.y.max()) + 1))


def trained(data: Images, regime: str, seed: int, steps: int) -> nn.Module:
    """A network whose layers share statistics as the regime says, while its gradient is that of the whole batch."""
    torch.manual_seed(seed)
    model = network(data) if SHARED[regime] == BATCH else plain8(data)
    model = renorm.convert(
        model, renorm.GhostBatchNorm, examples_per_group=SHARED[regime], tracking="var", report=lambda report: None
    )
    train(model, given(data, regime, seed), steps)
    return model


@torch.no_grad()
def with_outputs(model: nn.Module, given: Batches) -> Batches:
    """Inputs, each batch with what the network gives for it in training mode."""
    model.train()
    with renorm.freeze(model, statistics="batch"):
        return [(x, model(x)) for x, _ in given]


def distance(output: Tensor, training: Tensor) -> Tensor:
    """Squared, of each example."""
    return (output - training).square().mean(1)


def weigh_by_moments(model: nn.Module, given: Batches, *, per_layer: bool = False) -> None:
    """EvalNorm's way: layers normalize as nearly as in training mode, by one weight or by one each."""
    layers = [module for module in model.modules() if isinstance(module, renorm.Norm)]
    plain = {layer: copy.deepcopy(layer) for layer in layers}  # without gamma and beta
    for layer in plain.values():
        layer.weight = layer.bias = None
        layer.frozen = "batch"
    distances = {layer: torch.zeros(len(GRID)) for layer in layers}

    def compare(layer: renorm.Norm, inputs: tuple[Tensor]) -> None:
        training = plain[layer].train()(inputs[0])
        plain[layer].eval()
        for place, alpha in enumerate(GRID):
            plain[layer].example_weight = alpha
            distances[layer][place] += (plain[layer](inputs[0]) - training).square().mean()

    handles = [layer.register_forward_pre_hook(compare) for layer in layers]
    with_outputs(model, given)
    for handle in handles:
        handle.remove()
    total = torch.stack(list(distances.values())).sum(0)
    for layer in layers:
        layer.example_weight = GRID[int((distances[layer] if per_layer else total).argmin())]


def weighed(model: nn.Module, way: str, n: int, validation: Images, alike: Batches, shuffled: Batches) -> bool | None:
    """Set example weights in a way; whether weigh found noise alone."""
    weigh = partial(renorm.weigh, model, show_progress=False)
    if way == "by labels":
        return weigh(validation.batches(), "cross_entropy").is_noise
    if way == "by labels' accuracy":
        return weigh(validation.batches(), "accuracy").is_noise
    if way == "by training mode":
        return weigh([x for x, _ in alike], "training_mode").is_noise
    if way == "by training mode, each layer":
        return weigh([x for x, _ in alike], "training_mode", per="layer").is_noise
    if way == "by training mode, shuffled":
        return weigh([x for x, _ in shuffled], "training_mode", batch_size=n).is_noise
    if way == "by outputs":
        return weigh(with_outputs(model, alike), distance, higher_is_better=False).is_noise
    if way == "by moments":
        weigh_by_moments(model, alike)
    elif way == "by moments, each layer":
        weigh_by_moments(model, alike, per_layer=True)
    elif way == "1 / n":
        for module in model.modules():
            if isinstance(module, renorm.Norm):
                module.example_weight = 1 / n
    return None


EVERY_WAY = (
    "as trained", "by labels", "by labels' accuracy", "by training mode", "by training mode, each layer",
    "by training mode, shuffled", "by outputs", "by moments", "by moments, each layer", "1 / n",
)  # fmt: skip


def compare(regime: str, seed: int, steps: int, parts: list[Images]) -> Iterator[Row]:
    """Train a network, weigh it in every way."""
    training, validation, test = parts
    model = trained(training, regime, seed, steps)
    number = len(validation.y) // BATCH
    alike = list(islice(given(validation, regime, seed + 1_000), number))
    shuffled = list(islice(given(validation, regime, seed + 2_000, shuffled=True), number))
    for way in EVERY_WAY:
        copied = copy.deepcopy(model)
        is_noise = weighed(copied, way, SHARED[regime], validation, alike, shuffled)
        weights = [module.example_weight for module in copied.modules() if isinstance(module, renorm.Norm)]
        right = accuracy(copied, test)
        with torch.no_grad():
            loss = cross_entropy(torch.cat([copied(x) for x, _ in test.batches()]), test.y).item()
        yield Row(regime, seed, way, mean(weights), bool(is_noise), right, loss)


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Test accuracies by regime and way; a dot is a seed."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for i, (way, colour) in enumerate(WAYS.items()):
        for j, regime in enumerate(SHARED):
            found = [row.test_accuracy for row in rows if (row.regime, row.way) == (regime, way)]
            place = j + (i - (len(WAYS) - 1) / 2) * 0.14
            axes.bar(place, mean(found), 0.13, color=colour, alpha=0.8, label=way if j == 0 else None)
            axes.plot([place] * len(found), found, "k.", markersize=3)
    axes.set(
        xticks=range(len(SHARED)), xticklabels=list(SHARED), ylabel="test accuracy in %", title=picture_text(title)
    )
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(WAYS), fontsize=8)
    replace_file(path, partial(figure.savefig, dpi=150, format="png"))


def main() -> None:
    """Train, weigh, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="digits", help='"digits" (default), or an .npz file of colour images')
    parser.add_argument("--steps", type=positive, default=800, help="steps of a training (default: 800)")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for table, picture")
    args = parser.parse_args()
    if args.data != "digits" and not Path(args.data).is_file():
        parser.error(f'--data {args.data}: there is no such file; give an .npz file or "digits"')
    args.out.mkdir(parents=True, exist_ok=True)
    parts, name, rows = parts_of(args.data), Path(args.data).stem, []
    for regime in SHARED:
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
            for row in compare(regime, seed, args.steps, parts):
                rows.append(row)
                print(f"{regime}, seed {seed}, {row.way}: alpha {row.alpha:.3f}, test {row.test_accuracy:.2f}, "
                      f"loss {row.test_loss:.3f}{', noise' * row.is_noise}", flush=True)  # fmt: skip
    save_csv(args.out / f"unlabelled-{name}.csv", Row._fields, rows)
    draw(args.out / f"unlabelled-{name}.png", rows, f"{name}: batch norm, weighed without labels and with them")


if __name__ == "__main__":
    main()
