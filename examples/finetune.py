"""Fine-tuning a network with batch norm in small batches: batch norm, frozen, batch renorm, batch-group and group norm.

    pip install --no-build-isolation ".[vision,examples]"
    python examples/finetune.py --model resnet50 --pretrained --data FOLDER    # with subfolders train and val
    python examples/finetune.py --pretrain tiny_imagenet32.npz --weights pretrained.pt --data cifar100.npz --size 32 \\
        --per-class 10

The last is what docs/finetuning.md shows: it makes its own pretrained weights. Writes finetune.csv and finetune.png.
Source: Summers & Dinneen 2020, section 4.3.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn
from torch.utils.data import DataLoader, Subset

import renorm
from common import picture_text, positive, replace_file, save_csv, spread
from images import (
    SOURCES,
    Loader,
    accuracy,
    check_source,
    dataset,
    example_weight,
    network,
    pretrain,
    shuffled,
    split,
    train,
    transforms,
)

GROUPS = 16  # of channels, where a method has such
EVALUATED = 200  # images of a batch, at evaluation


class Method(NamedTuple):
    """How a pretrained network's norm layers are changed, and what surrounds the training."""

    label: str
    colour: str  # of Okabe and Ito
    convert: Callable[[nn.Module], nn.Module]
    mode: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext


def to_batch_renorm(model: nn.Module) -> nn.Module:
    """For a warm start: the running statistics are good, so the correction is as large as ever from the first step."""
    return renorm.convert(model, renorm.BatchRenorm, limits=renorm.Limits.constant(r_max=3, d_max=5), steps="keep")


def to_batch_group(model: nn.Module) -> nn.Module:
    """Statistics over 2 examples and some channels: not what the network was pretrained with."""
    return renorm.convert(model, renorm.BatchGroupNorm, num_groups=GROUPS)


def to_group(model: nn.Module) -> nn.Module:
    """Each example by itself; with example weight 1 at evaluation too, which is group norm."""
    return renorm.convert(model, renorm.BatchGroupNorm, num_groups=GROUPS, examples_per_group=1, example_weight=1.0)


METHODS = {
    "batch": Method("batch norm", "#D55E00", lambda model: model),
    "frozen": Method(
        "batch norm, frozen",
        "#E69F00",
        partial(renorm.convert, to=renorm.BatchNorm),
        partial(renorm.freeze, statistics="running"),
    ),
    "renorm": Method("batch renorm", "#0072B2", to_batch_renorm),
    "batchgroup": Method("batch-group norm", "#009E73", to_batch_group),
    "group": Method("group norm", "#CC79A7", to_group),
}


class Row(NamedTuple):
    """One run; accuracies in %, with the example weight off and on."""

    batch: int
    method: str
    rate: float  # by an image of the batch
    seed: int
    alpha: float
    validation_off: float
    validation_on: float
    test_off: float
    test_on: float


def finetune(
    pretrained: nn.Module, method: Method, train_loader: Loader, validation: Loader, test: Loader, epochs: int,
    rate: float,
) -> tuple[float, float, float, float, float]:  # fmt: skip
    """Convert a copy, train it, choose its example weight on the validation images: alpha, and four accuracies."""
    model = method.convert(copy.deepcopy(pretrained))
    train(model, train_loader, epochs, rate, method.mode)
    off = accuracy(model, validation), accuracy(model, test)
    renorm.weigh(model, validation)
    on = accuracy(model, validation), accuracy(model, test)
    return example_weight(model), off[0], on[0], off[1], on[1]


def starting_point(args: argparse.Namespace) -> nn.Module:
    """The pretrained network, without a head."""
    if args.pretrain is not None:
        torch.manual_seed(0)
        data = dataset(args.pretrain, "train")
        model = network(args.model, max(data.targets) + 1, args.size).to(args.device)
        data.transform, evaluation = transforms(model, args.size)
        pretrain(model, data, range(len(data)), args.pretrain_epochs, seed=0, file=args.weights)
        test = DataLoader(dataset(args.pretrain, "test", evaluation), EVALUATED)
        print(f"{args.model} on {args.pretrain.stem}: test accuracy {accuracy(model, test):.1f}%", flush=True)
    base = network(args.model, 0, args.size, args.pretrained)
    if args.weights is not None:
        state = torch.load(args.weights, map_location="cpu", weights_only=True)
        if missing := base.load_state_dict(state, strict=False).missing_keys:
            raise ValueError(f"--weights {args.weights} lacks {', '.join(missing)} of --model {args.model}")
    return base


def best_rate(rows: list[Row], batch: int, method: str) -> float:
    """The learning rate with which the first seed got the best validation accuracy."""
    first = [row for row in rows if (row.batch, row.method, row.seed) == (batch, method, 0)]
    return max(first, key=lambda row: row.validation_on).rate


def compared(rows: list[Row]) -> list[Row]:
    """The runs of each method and batch size at its best learning rate."""
    return [row for row in rows if row.rate == best_rate(rows, row.batch, row.method)]


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Draw a panel for each batch size: every run, and the mean of each method, example weight off and on."""
    batches = list(dict.fromkeys(row.batch for row in rows))
    figure = Figure(figsize=(3.2 * len(batches) + 1.4, 5), layout="constrained")
    figure.suptitle(picture_text(title))
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for batch, axes in zip(batches, panels, strict=True):
        names = list(dict.fromkeys(row.method for row in rows if row.batch == batch))
        for at, name in enumerate(names):
            colour, runs = METHODS[name].colour, [row for row in rows if (row.batch, row.method) == (batch, name)]
            for place, values, filled in (
                (at - 0.15, [run.test_off for run in runs], False),
                (at + 0.15, [run.test_on for run in runs], True),
            ):
                axes.plot([place] * len(values), values, "_", color=colour, markersize=12)
                axes.plot(place, mean(values), "o", color=colour, markersize=7, fillstyle="full" if filled else "none")
        axes.set_xticks(range(len(names)), [METHODS[name].label for name in names])
        axes.tick_params(axis="x", rotation=90)
        axes.set(title=f"batches of {batch}", xlim=(-0.6, len(names) - 0.4))
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("test accuracy in %")
    handles = [Line2D([], [], color="black", marker=marker, linestyle="", fillstyle=style)
               for marker, style in (("o", "none"), ("o", "full"), ("_", "full"))]  # fmt: skip
    figure.legend(handles, ["as trained", "example weight chosen", "runs"], loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150, format="png")


def print_table(rows: list[Row]) -> None:
    """Print test accuracies and example weights: mean and standard deviation over seeds."""
    print(f"\n{'batch':>5} {'method':20} {'rate':>7} {'weight off':>14} {'weight on':>14} {'weight':>13}")
    for batch, name in dict.fromkeys((row.batch, row.method) for row in rows):
        runs = [row for row in rows if (row.batch, row.method) == (batch, name)]
        off, on = (spread([getattr(run, column) for run in runs], 1) for column in ("test_off", "test_on"))
        alpha = spread([run.alpha for run in runs], 2)
        print(f"{batch:5} {METHODS[name].label:20} {runs[0].rate:7g} {off:>14} {on:>14} {alpha:>13}")


def read_options() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help=f"images to fine-tune on: {SOURCES}")
    parser.add_argument("--model", default="test_resnet", help="a network of timm with batch norm")
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    parser.add_argument(
        "--pretrain", type=Path, metavar="DATA", help="pretrain on these images, unless --weights exist"
    )
    parser.add_argument("--weights", type=Path, help="a state dict to start from; --pretrain writes it")
    parser.add_argument("--pretrain-epochs", type=positive, default=8)
    parser.add_argument("--size", type=positive, default=224, help="pixels of an image's side (default: 224)")
    parser.add_argument("--per-class", type=positive, help="training images of a class, and as many for validation")
    parser.add_argument("--epochs", type=positive, default=5)
    parser.add_argument("--batches", type=positive, nargs="+", default=[2, 8])
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.0005, 0.0015, 0.005],
        help="learning rates to choose from, by an image of the batch",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for table, picture")
    args = parser.parse_args()
    if min(args.batches) < 2:
        parser.error(f"--batches must be at least 2, got {min(args.batches)}: batch norm needs two examples")
    if args.pretrain is not None and args.weights is None:
        parser.error("--pretrain needs --weights FILE, where the weights are kept")
    check_source(parser, "--data", args.data)
    if args.pretrain is not None:
        check_source(parser, "--pretrain", args.pretrain)
    if args.weights is not None and args.pretrain is None and not args.weights.exists():
        parser.error(f"--weights {args.weights}: there is no such file, and no --pretrain DATA to make it from")
    return args


def main() -> None:
    """Fine-tune with every batch size and method; the table is written anew after each run."""
    args = read_options()
    args.out.mkdir(parents=True, exist_ok=True)
    base = starting_point(args)
    augmented, evaluation = transforms(base, args.size)
    data, plain = dataset(args.data, "train", augmented), dataset(args.data, "train", evaluation)
    test = DataLoader(dataset(args.data, "test", evaluation), EVALUATED)
    rows: list[Row] = []

    def run(batch: int, name: str, rate: float, seed: int) -> None:
        chosen, held_out = split(data.targets, args.per_class, seed)
        torch.manual_seed(seed)
        base.reset_classifier(max(data.targets) + 1)
        loaders = shuffled(data, chosen, batch, seed), DataLoader(Subset(plain, held_out), EVALUATED), test
        found = finetune(base.to(args.device), METHODS[name], *loaders, args.epochs, rate * batch)
        rows.append(Row(batch, name, rate, seed, *found))
        print(f"batches of {batch}, {METHODS[name].label}, rate {rate:g} x {batch}, seed {seed}: {found[3]:.1f}%, "
              f"with example weight {found[0]:.2f}: {found[4]:.1f}%", flush=True)  # fmt: skip
        save_csv(args.out / "finetune.csv", Row._fields, rows)

    for batch in args.batches:
        for name in dict.fromkeys(args.methods):
            for rate in args.rates:
                run(batch, name, rate, seed=0)
            for seed in range(1, args.seeds):
                run(batch, name, best_rate(rows, batch, name), seed)
    title = f"{args.model} fine-tuned on {args.data.stem}, {args.seeds} seeds"
    replace_file(args.out / "finetune.png", lambda path: draw(path, compared(rows), title))
    print_table(compared(rows))


if __name__ == "__main__":
    main()
