"""One round of federated learning: what becomes of running statistics that clients send.

    pip install --no-build-isolation ".[vision,examples]"
    python examples/federated.py                       # ten clients with two digits each, 5 seeds

One network is trained on everybody's digits; then each client takes statistics of its own data, which are averaged, or
merged by renorm.merge. Once all clients' scanners are alike, once each has a brightness of its own. Writes
federated.csv and federated.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import renorm
from common import positive, replace_file, save_csv

CLIENTS, STEPS, BATCH = 10, 150, 64
SCANNERS = {"alike": 0.0, "a brightness each": 0.4}
COLORS = {"averaged": "#D55E00", "merged": "#0072B2"}  # Okabe and Ito's


class Row(NamedTuple):
    """Test accuracies of a round."""

    scanners: str
    seed: int
    averaged: float
    merged: float


def data(brightness: float) -> tuple[Tensor, Tensor, Tensor]:
    """Digits, (N, 1, 8, 8), their classes and their clients, each of whom has two classes."""
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16.0, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    client = (y + torch.arange(len(y)) % 2) % CLIENTS
    return x + brightness * client[:, None, None, None], y, client


def train(x: Tensor, y: Tensor) -> nn.Module:
    """A small network, on everybody's digits."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), renorm.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64),
        renorm.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,))
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def averaged(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every number by itself, as federated averaging does."""
    return {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}


def round_of(scanners: str, seed: int) -> Row:
    """A training, and the statistics of all clients."""
    torch.manual_seed(seed)
    x, y, client = data(SCANNERS[scanners])
    is_test = torch.arange(len(x)) % 4 == 0
    model = train(x[~is_test], y[~is_test])
    states, counts = [], []
    for i in range(CLIENTS):
        own = x[~is_test & (client == i)]
        renorm.estimate(model, own.split(BATCH))
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        counts.append(len(own))
    accuracies = []
    for state in (averaged(states), renorm.merge(states, counts)):
        model.load_state_dict(state)
        with torch.no_grad():
            right = model.eval()(x[is_test]).argmax(1) == y[is_test]
        accuracies.append(round(float(right.float().mean()), 4))
    return Row(scanners, seed, *accuracies)


def draw(rows: list[Row], path: Path) -> None:
    """A bar for each kind of statistics, a dot for each seed."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, color) in enumerate(COLORS.items()):
        for j, scanners in enumerate(SCANNERS):
            found = [100 * getattr(row, name) for row in rows if row.scanners == scanners]
            place = j + 0.36 * (i - 0.5)
            axes.bar(place, sum(found) / len(found), 0.34, color=color, label=name if j == 0 else None)
            axes.plot([place] * len(found), found, "k.", markersize=4)
    axes.set(
        xticks=range(len(SCANNERS)), xticklabels=[f"scanners: {name}" for name in SCANNERS], ylim=(0, 105),
        ylabel="test accuracy in %", title="Ten clients with two digits each; a dot is a seed",
    )  # fmt: skip
    figure.legend(loc="outside lower center", ncols=2)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for table, picture")
    chosen = parser.parse_args()
    rows = [round_of(scanners, seed) for scanners in SCANNERS for seed in range(chosen.seeds)]
    for row in rows:
        print(f"scanners {row.scanners}, seed {row.seed}: averaged {row.averaged:.3f}, merged {row.merged:.3f}")
    save_csv(chosen.out / "federated.csv", Row._fields, rows)
    draw(rows, chosen.out / "federated.png")


if __name__ == "__main__":
    main()
