"""A network trained with batch norm on batches of few classes: what inspect says of it, and what weigh wins back.

    pip install --no-build-isolation ".[vision,examples]"
    python examples/trained.py                                                  # a perceptron on digits, 5 seeds
    python examples/trained.py --data cifar100.npz --classes 4 --steps 3000 --seeds 3    # a small convolutional network

Each network is trained once on independent batches and once on batches of few classes, then looked at and weighed on
validation data, and judged on test data. Writes trained-DATA.csv and trained-DATA.png.
Source: Summers & Dinneen 2020, sections 3.1 and 4.4.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import renorm
from common import descend, picture_text, positive, replace_file, save_csv, spread
from renorm.samplers import ClassBatchSampler, RandomBatchSampler

BATCH, EVALUATED = 32, 25
REGIMES = ("independent", "few classes")
STYLES = {"independent": ("#0072B2", "o"), "few classes": ("#D55E00", "s")}  # Okabe and Ito's


class Images(NamedTuple):
    """Standardized images, (N, C, H, W), and classes, (N,)."""

    x: Tensor
    y: Tensor

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """For evaluation."""
        return list(zip(self.x.split(EVALUATED), self.y.split(EVALUATED), strict=True))


class Row(NamedTuple):
    """A trained network. Accuracies and gains are in %."""

    regime: str
    seed: int
    metric: str
    gap: float  # training mode less evaluation, on validation batches like those of the training
    gap_low: float
    gap_high: float
    between_within: float  # of the first norm layer
    worst: str  # the first measure that inspect has a finding of about a layer
    alpha: float
    gain: float  # on validation data, by the metric
    gain_low: float
    gain_high: float
    passes: float
    test_before: float
    test_after: float


def load(source: str) -> tuple[Images, Images, Images]:
    """Training, validation and test images: of "digits", or of an .npz file with x_train, y_train, x_test, y_test."""
    if source == "digits":
        digits = load_digits()
        x, x_test, y, y_test = train_test_split(
            digits.images[:, None], digits.target, test_size=450, stratify=digits.target, random_state=0
        )
    else:
        with np.load(source) as file:
            x, y, x_test, y_test = (file[name] for name in ("x_train", "y_train", "x_test", "y_test"))
        x, x_test = (images.transpose(0, 3, 1, 2) for images in (x, x_test))
    x, x_validation, y, y_validation = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    mean, std = (torch.tensor(by(x, axis=(0, 2, 3))).float()[:, None, None] for by in (np.mean, np.std))

    def images(x: np.ndarray, y: np.ndarray) -> Images:
        return Images((torch.tensor(x).float() - mean) / std, torch.tensor(y).long())

    return images(x, y), images(x_validation, y_validation), images(x_test, y_test)


def network(data: Images) -> nn.Module:
    """A perceptron for digits, and for colour images a convolutional network, both with nn.BatchNorm."""
    classes, channels = int(data.y.max()) + 1, data.x.shape[1]
    layers: list[nn.Module] = []
    if channels == 1:
        for before, after in pairwise([data.x[0].numel(), 128, 128, 128, 128]):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, classes))
    for before, after in pairwise([channels, 32, 64, 128]):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def batches(data: Images, regime: str, classes: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of 32: of any examples, or of so many classes."""
    sampler: RandomBatchSampler | ClassBatchSampler = RandomBatchSampler(len(data.y), BATCH, seed=seed)
    if regime == "few classes":
        sampler = ClassBatchSampler(data.y, classes, BATCH // classes, seed=seed)
    for epoch in count():
        sampler.set_epoch(epoch)
        for chosen in sampler:
            yield data.x[chosen], data.y[chosen]


def train(model: nn.Module, given: Iterator[tuple[Tensor, Tensor]], steps: int) -> None:
    """SGD, its rate falling from 0.05 to 0 along a cosine."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in islice(given, steps):
        descend(optimizer, cross_entropy(model(x), y))
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """In %, at evaluation."""
    right = [model.eval()(x).argmax(1) == y for x, y in data.batches()]
    return 100 * torch.cat(right).double().mean().item()


def look(regime: str, seed: int, classes: int, steps: int, parts: tuple[Images, Images, Images]) -> Iterator[Row]:
    """Train a network, inspect it, weigh it by each metric."""
    training, validation, test = parts
    torch.manual_seed(seed)
    model = network(training)
    train(model, batches(training, regime, classes, seed), steps)
    found = renorm.inspect(model, islice(batches(validation, regime, classes, seed), 50))
    worst = next((finding.measure for finding in found.findings if finding.layer is not None), "none")
    gap, before = found.modes[0].gap, accuracy(model, test)
    for metric, unit in (("accuracy", 100), ("cross_entropy", 1)):
        weighed = copy.deepcopy(model)
        weighing = renorm.weigh(weighed, validation.batches(), metric)
        gain = weighing.gain
        yield Row(
            regime, seed, metric, 100 * gap.mean, 100 * gap.low, 100 * gap.high, found.layers[0].between_within, worst,
            weighing.alpha or 0.0, unit * gain.mean, unit * gain.low, unit * gain.high, weighing.passes, before,
            accuracy(weighed, test),
        )  # fmt: skip


def draw(path: Path, rows: list[Row], title: str) -> None:
    """The gain on validation data with its interval, and the test accuracy before and after, of every network."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(picture_text(title))
    gains, tests = figure.subplots(1, 2)
    shown = [row for row in rows if row.metric == "accuracy"]
    for place, row in enumerate(shown):
        colour, marker = STYLES[row.regime]
        ends = [[row.gain - row.gain_low], [row.gain_high - row.gain]]
        gains.errorbar(row.gain, place, xerr=ends, fmt=marker, color=colour, capsize=3)
        tests.plot([row.test_before, row.test_after], [place, place], "-", color=colour, linewidth=1)
        tests.plot(row.test_before, place, marker, color=colour, markerfacecolor="white")
        tests.plot(row.test_after, place, marker, color=colour)
    for axes in (gains, tests):
        axes.set_yticks(range(len(shown)), [f"{row.regime}, seed {row.seed}" for row in shown], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    tests.tick_params(labelleft=False)
    gains.axvline(0, color="#666666", linewidth=0.8)
    gains.set(title="weigh's gain on validation data", xlabel="points of accuracy, with 95% interval")
    tests.set(title="on test data", xlabel="accuracy in %: open as trained, filled weighed")
    replace_file(path, partial(figure.savefig, dpi=150, format="png"))


def main() -> None:
    """Train, look, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="digits", help='"digits" (default), or an .npz file')
    parser.add_argument("--classes", type=positive, default=2, help="classes of a batch of 32 (default: 2)")
    parser.add_argument("--steps", type=positive, default=1_000, help="steps of a training (default: 1000)")
    parser.add_argument("--seeds", type=positive, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for table, picture")
    args = parser.parse_args()
    if BATCH % args.classes:
        parser.error(f"--classes {args.classes}: must divide {BATCH}")
    if args.data != "digits" and not Path(args.data).is_file():
        parser.error(f'--data {args.data}: there is no such file; give an .npz file or "digits"')
    args.out.mkdir(parents=True, exist_ok=True)
    parts, name, rows = load(args.data), Path(args.data).stem, []
    for regime in REGIMES:
        for seed in range(args.seeds):
            for row in look(regime, seed, args.classes, args.steps, parts):
                rows.append(row)
                gain = f"{row.gain:.2f} [{row.gain_low:.2f}, {row.gain_high:.2f}]"
                print(f"{regime}, seed {seed}, {row.metric}: alpha {row.alpha:.3f}, gain {gain}, "
                      f"test {row.test_before:.2f} to {row.test_after:.2f}", flush=True)  # fmt: skip
    save_csv(args.out / f"trained-{name}.csv", Row._fields, rows)
    draw(
        args.out / f"trained-{name}.png",
        rows,
        f"{name}: batch norm, trained on independent batches and on batches of {args.classes} classes",
    )
    for regime in REGIMES:
        for metric in ("accuracy", "cross_entropy"):
            ours = [row for row in rows if (row.regime, row.metric) == (regime, metric)]
            before, after = ([getattr(row, part) for row in ours] for part in ("test_before", "test_after"))
            sure = sum(row.gain_low > 0 for row in ours)
            print(
                f"{regime}, by {metric}: test {spread(before, 2)} to {spread(after, 2)}; sure gains {sure}/{len(ours)}"
            )


if __name__ == "__main__":
    main()
