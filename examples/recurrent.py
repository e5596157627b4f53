"""Digits read row by row in batches of 4: nn.LSTM, an LSTM with batch norm per time step, and BatchRenormLSTM.

`python examples/recurrent.py` takes five to ten minutes and needs matplotlib and scikit-learn; `--data fashion_mnist`
needs torchvision. Writes recurrent.csv and recurrent.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import renorm
from common import positive, replace_file, save_csv

# colours of Okabe and Ito, which colour-blind readers tell apart
STYLES = {"nn.LSTM": ("#000000", ":"), "batch norm per step": ("#D55E00", "--"), "BatchRenormLSTM": ("#0072B2", "-")}
HIDDEN, EVALUATIONS = 32, 20
Data = tuple[Tensor, Tensor, Tensor, Tensor]  # rows (N, T, I) and labels to train with, rows and labels to test with
Points = dict[tuple[int, float, str, int], float]  # test accuracy in % by seed, learning rate, method and step


class StepwiseLSTM(nn.Module):
    """Cooijmans et al. 2017: batch norm in an LSTM, with statistics of its own for every time step."""

    def __init__(self, input_size: int, hidden_size: int, steps: int) -> None:
        super().__init__()
        plain = nn.LSTMCell(input_size, hidden_size)
        self.weight_ih, self.weight_hh, self.bias = plain.weight_ih, plain.weight_hh, plain.bias_ih
        self.bias_c = nn.Parameter(torch.zeros(hidden_size))
        widths = (4 * hidden_size, 4 * hidden_size, hidden_size)
        self.gains = nn.ParameterList(torch.full((width,), 0.1) for width in widths)
        self.ih, self.hh, self.c = (  # with BatchRenormLSTM's momentum
            nn.ModuleList(nn.BatchNorm1d(width, momentum=0.01, affine=False) for _ in range(steps)) for width in widths
        )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Outputs of all steps, (N, T, H)."""
        h = c = x.new_zeros(len(x), len(self.bias_c))
        outputs = []
        for row, norm_ih, norm_hh, norm_c in zip(x.unbind(1), self.ih, self.hh, self.c, strict=True):
            gates = self.gains[0] * norm_ih(row @ self.weight_ih.T) + self.gains[1] * norm_hh(h @ self.weight_hh.T)
            i, f, g, o = (gates + self.bias).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * (self.gains[2] * norm_c(c) + self.bias_c).tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), None


class Classifier(nn.Module):
    """A recurrent layer, and a linear one on its last output."""

    def __init__(self, method: str, rows: int, features: int, total_steps: int) -> None:
        super().__init__()
        limits = renorm.Limits.over(total_steps)
        self.rnn = {
            "nn.LSTM": lambda: nn.LSTM(features, HIDDEN, batch_first=True),
            "batch norm per step": lambda: StepwiseLSTM(features, HIDDEN, rows),
            "BatchRenormLSTM": lambda: renorm.BatchRenormLSTM(features, HIDDEN, batch_first=True, limits=limits),
        }[method]()
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores, (N, 10)."""
        scores: Tensor = self.head(self.rnn(x)[0][:, -1])
        return scores


def train(model: nn.Module, data: Data, rate: float, total_steps: int, batch_size: int) -> Iterator[tuple[int, float]]:
    """Train with Adam; yields step and test accuracy in %, twenty times."""
    train_x, train_y, test_x, test_y = data
    optimizer = torch.optim.Adam(model.parameters(), rate)
    evaluate_at = {round(total_steps * (k + 1) / EVALUATIONS) for k in range(EVALUATIONS)}
    for step in range(1, total_steps + 1):
        chosen = torch.randint(len(train_x), (batch_size,))
        loss = nn.functional.cross_entropy(model(train_x[chosen]), train_y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in evaluate_at:
            model.eval()
            with torch.no_grad():
                yield step, 100 * (model(test_x).argmax(1) == test_y).float().mean().item()
            model.train()


def load(name: str) -> Data:
    """scikit-learn's digits, 8 rows of 8 pixels, a quarter for the test; or torchvision's FashionMNIST, 28 of 28."""
    if name == "fashion_mnist":
        from torchvision.datasets import FashionMNIST

        first, second = (FashionMNIST("data", train=is_train, download=True) for is_train in (True, False))
        return first.data / 255, first.targets, second.data / 255, second.targets
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = torch.from_numpy(load_digits().images).float() / 16, torch.from_numpy(load_digits().target)
    chosen, held_out = train_test_split(range(len(x)), test_size=0.25, random_state=0, stratify=y)
    return x[chosen], y[chosen], x[held_out], y[held_out]


def draw(points: Points, title: str) -> Figure:
    """A panel for each learning rate: mean over seeds, and a band from the smallest to the largest."""
    seeds, rates, _, steps = (sorted(set(column)) for column in zip(*points, strict=True))
    figure = Figure(figsize=(3.6 * len(rates) + 0.6, 4.4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for rate, axes in zip(rates, panels, strict=True):
        for method, (colour, style) in STYLES.items():
            columns = [[points[seed, rate, method, step] for seed in seeds] for step in steps]
            axes.plot(steps, list(map(mean, columns)), color=colour, linestyle=style, linewidth=1.8, label=method)
            low, high = list(map(min, columns)), list(map(max, columns))
            axes.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.set(title=f"learning rate {rate:g}", xlabel="training step", ylim=(60, 100), xlim=(0, steps[-1]))
        axes.locator_params(axis="x", nbins=4)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy in %")
    lines = panels[0].get_lines()
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, handlelength=3)
    return figure


def save(folder: Path, name: str, points: Points, title: str) -> None:
    """Write table and picture."""
    rows = [(*key, round(value, 2)) for key, value in points.items()]
    save_csv(folder / f"{name}.csv", ("seed", "learning_rate", "method", "step", "test_accuracy"), rows)
    replace_file(folder / f"{name}.png", lambda path: draw(points, title).savefig(path, format="png", dpi=150))


def main() -> None:
    """Train, print a table, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=("digits", "fashion_mnist"), default="digits")
    parser.add_argument("--steps", type=positive, default=4_000)
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.002, 0.005, 0.01])
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    title = f"{args.data}, row by row, batches of {args.batch_size} (mean of {args.seeds} seeds, band: their range)"
    stem = "recurrent" if args.data == "digits" else f"recurrent-{args.data}"
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    data = load(args.data)
    rows, features = data[0].shape[1:]
    points: Points = {}
    for rate in args.rates:
        print(f"learning rate {rate:g}: test accuracy in % after a fifth of the training, and at its end, by seed")
        ends = {}
        for method in STYLES:
            curves = []
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                model = Classifier(method, rows, features, args.steps)
                curves.append(dict(train(model, data, rate, args.steps, args.batch_size)))
                points |= {(seed, rate, method, step): accuracy for step, accuracy in curves[-1].items()}
            cells = [[list(curve.values())[at] for curve in curves] for at in (len(curves[0]) // 5 - 1, -1)]
            print(f"  {method:20}", *(f"{mean(cell):6.1f} {[round(x, 1) for x in cell]}" for cell in cells), flush=True)
            ends[method] = mean(cells[1])
        print(f"  best at the end: {max(ends, key=ends.__getitem__)}")
        save(args.out, stem, points, title)  # an interrupted run keeps what it has


if __name__ == "__main__":
    main()
