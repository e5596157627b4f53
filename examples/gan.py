"""A small GAN: real and fake batches go through the discriminator apart, with batch norm against batch renorm.

    pip install --no-build-isolation ".[examples]"
    python examples/gan.py                         # 3 methods x 3 seeds on scikit-learn's digits
    python examples/gan.py --data fashion_mnist    # by torchvision, which downloads it
    python examples/gan.py --steps 50 --seeds 1 --out /tmp/gan

In training a batch of fakes is normalized by fakes and a batch of real images by real ones; at evaluation both are by
the same running statistics. Ioffe 2017 (section 5) names GANs as a use of batch renormalization. What is measured: both
networks in both modes, the discriminator on the same images, the generator by its distance to real images.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, softplus

import renorm
from common import LABELS, descend, draw_curve, options, positive, replace_file, save_csv, spread

LATENT, WIDTH = 32, 32
MOMENTUM, LEARNING_RATE = 0.01, 2e-4
EVALUATIONS, SAMPLES, HELD_OUT, SHOWN = 15, 1_000, 320, 32
MODES = {"train": "training mode", "eval": "evaluation"}
MEASURES = {  # axis label, scale, ticks
    "accuracy": ("discriminator's accuracy\n(0.5: chance)", "linear", (0.5, 0.6, 0.7, 0.8, 0.9, 1)),
    "logit_gap": ("discriminator's mean logit,\nreal minus fake (log above 1)", "symlog", (0, 0.5, 1, 2, 5, 10, 20)),
    "distance": ("generator's Fréchet distance\nto real images (lower is better)", "log", (5, 10, 20, 50, 100, 500)),
}

Samples = dict[tuple[str, str], Tensor]  # by method and mode


class Row(NamedTuple):
    """What is measured at one step of one run, with both networks in training mode and at evaluation."""

    norm: str
    seed: int
    step: int
    accuracy_train: float
    accuracy_eval: float
    logit_gap_train: float
    logit_gap_eval: float
    distance_train: float
    distance_eval: float


def norm_layer(norm: str, channels: int, steps: int) -> nn.Module:
    """The normalization of `channels` feature maps."""
    if norm == "renorm":
        return renorm.BatchRenorm2d(channels, momentum=MOMENTUM, limits=renorm.Limits.over(steps))
    return renorm.BatchNorm2d(channels, momentum=MOMENTUM) if norm == "batch" else nn.Identity()


def make_generator(norm: str, size: int, steps: int) -> nn.Sequential:
    """(N, LATENT) -> (N, 1, size, size), with values from -1 to 1."""
    wide, side = 2 * WIDTH, size // 4
    return nn.Sequential(
        nn.Linear(LATENT, wide * side * side), nn.Unflatten(1, (wide, side, side)),
        norm_layer(norm, wide, steps), nn.ReLU(),
        nn.ConvTranspose2d(wide, WIDTH, 4, 2, 1), norm_layer(norm, WIDTH, steps), nn.ReLU(),
        nn.ConvTranspose2d(WIDTH, WIDTH, 4, 2, 1), norm_layer(norm, WIDTH, steps), nn.ReLU(),
        nn.Conv2d(WIDTH, 1, 3, 1, 1), nn.Tanh(),
    )  # fmt: skip


def make_discriminator(norm: str, size: int, steps: int) -> nn.Sequential:
    """(N, 1, size, size) -> (N, 1), the logit of being real; the first layer has no normalization, as in DCGAN."""
    wide, side = 2 * WIDTH, size // 4
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(WIDTH, wide, 4, 2, 1), norm_layer(norm, wide, steps), nn.LeakyReLU(0.2),
        nn.Conv2d(wide, wide, 3, 1, 1), norm_layer(norm, wide, steps), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(wide * side * side, 1),
    )  # fmt: skip


class Gan:
    """Both networks and their optimizers."""

    def __init__(self, norm: str, size: int, steps: int) -> None:
        self.generator, self.discriminator = make_generator(norm, size, steps), make_discriminator(norm, size, steps)
        adam = partial(torch.optim.Adam, lr=LEARNING_RATE, betas=(0.5, 0.999))
        self.generator_optimizer = adam(self.generator.parameters())
        self.discriminator_optimizer = adam(self.discriminator.parameters())

    def update(self, real: Tensor) -> None:
        """One step of the discriminator and one of the generator, on the same fakes."""
        fake = self.generator(torch.randn(len(real), LATENT))
        with renorm.accumulate(self.discriminator):  # two forwards, one move of the running statistics
            loss = softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(fake.detach())).mean()
        descend(self.discriminator_optimizer, loss)
        with renorm.freeze(self.discriminator):  # the generator's step only passes through
            loss = softplus(-self.discriminator(fake)).mean()
        descend(self.generator_optimizer, loss)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor, mode: str, batch_size: int) -> Tensor:
    """What the model makes of each batch, in training mode or at evaluation; the running statistics stay."""
    model.train(mode == "train")
    with renorm.freeze(model):
        y = torch.cat([model(batch) for batch in x.split(batch_size)])
    model.train()
    return y


class Yardstick:
    """The Fréchet distance to real images, in the features of a classifier that is trained on them.

    Args:
        images: (N, 1, H, W).
        labels: (N,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        torch.manual_seed(0)  # the same yardstick for every run
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 128), nn.ReLU(), nn.Linear(128, 32))
        classifier = nn.Sequential(self.features, nn.ReLU(), nn.Linear(32, int(labels.max()) + 1))
        optimizer = torch.optim.Adam(classifier.parameters())
        for _ in range(1_500):
            batch = torch.randint(len(images), (64,))
            descend(optimizer, cross_entropy(classifier(images[batch]), labels[batch]))
        self.real = self._moments(images)

    @torch.no_grad()
    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images).double()
        return features.mean(0), features.T.cov()

    def distance(self, images: Tensor) -> float:
        """Between Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)."""
        (mean_1, cov_1), (mean_2, cov_2) = self.real, self._moments(images)
        values, vectors = torch.linalg.eigh(cov_1)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        shared = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
        return float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * shared)


def measure(gan: Gan, yardstick: Yardstick, real: Tensor, latents: Tensor, batch_size: int) -> list[float]:
    """The six numbers of a Row; the discriminator judges the same images in both modes."""
    accuracies, gaps, distances = [], [], []
    fake = outputs(gan.generator, latents[: len(real)], "train", batch_size)
    for mode in MODES:
        on_real, on_fake = (outputs(gan.discriminator, images, mode, batch_size) for images in (real, fake))
        accuracies.append(((on_real > 0).float().mean() + (on_fake < 0).float().mean()).item() / 2)
        gaps.append((on_real.mean() - on_fake.mean()).item())
        distances.append(yardstick.distance(outputs(gan.generator, latents, mode, batch_size)))
    return [*accuracies, *gaps, *distances]


def train(
    norm: str, seed: int, steps: int, batch_size: int, images: Tensor, held_out: Tensor, yardstick: Yardstick
) -> tuple[list[Row], Samples]:
    """One run: a row for every evaluation, and samples at the end."""
    torch.manual_seed(seed)
    gan = Gan(norm, images.shape[-1], steps)
    latents = torch.randn(SAMPLES, LATENT)
    evaluate_at = {round(steps * (k + 1) / EVALUATIONS) for k in range(EVALUATIONS)}
    rows: list[Row] = []
    for step in range(1, steps + 1):
        gan.update(images[torch.randint(len(images), (batch_size,))])
        if step in evaluate_at:
            rows.append(Row(norm, seed, step, *measure(gan, yardstick, held_out, latents, batch_size)))
    return rows, {(norm, mode): outputs(gan.generator, latents[:SHOWN], mode, batch_size) for mode in MODES}


def load(data: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 1, H, W) from -1 to 1, and labels (N,), in random order."""
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = torch.as_tensor(digits.images).float() / 8 - 1, torch.as_tensor(digits.target)
    else:
        from torchvision.datasets import FashionMNIST

        fashion = FashionMNIST(str(folder), download=True)
        images, labels = fashion.data[:20_000] / 127.5 - 1, fashion.targets[:20_000]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].unsqueeze(1), labels[order].long()


def draw(path: Path, rows: list[Row], samples: Samples, title: str) -> None:
    """Draw the measures in both modes, and below them each method's samples in both modes."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    above, below = figure.subfigures(2, 1, height_ratios=(3, 1))
    for (name, (label, scale, ticks)), axes in zip(MEASURES.items(), above.subplots(1, 3), strict=True):
        for norm, mode in samples:
            points = [(row.step, getattr(row, f"{name}_{mode}")) for row in rows if row.norm == norm]
            draw_curve(axes, points, norm, "-" if mode == "eval" else "--", f"{LABELS[norm]}, {MODES[mode]}")
        axes.set(xlabel="training step", ylabel=label, yscale=scale)
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    above.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(samples) // 2)
    cells = below.subplots(1, len(samples), squeeze=False)[0]
    for axes, ((norm, mode), images) in zip(cells, samples.items(), strict=True):
        framed = pad(images, (1, 1, 1, 1), value=-1)
        grid = framed.reshape(4, -1, *framed.shape[-2:]).transpose(1, 2).flatten(2).flatten(0, 1)
        axes.imshow(grid.numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes.set_title(f"{LABELS[norm]},\n{MODES[mode]}", fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=150, format="png")


def print_table(rows: list[Row]) -> None:
    """Print averages over the last third of the training: mean and standard deviation over seeds."""
    late = [row for row in rows if 3 * row.step > 2 * rows[-1].step]
    names = Row._fields[3:]
    print("\nlast third of the training\n" + " " * 8 + "".join(f"{name:>18}" for name in names))
    for norm in dict.fromkeys(row.norm for row in late):
        runs = [[row for row in late if (row.norm, row.seed) == (norm, seed)] for seed in {row.seed for row in late}]
        cells = (spread([mean(getattr(row, name) for row in run) for run in runs if run], 2) for name in names)
        print(f"{norm:8}" + "".join(f"{cell:>18}" for cell in cells))


def main() -> None:
    """Train every method with every seed; files are written anew after each run."""
    parser = options(__doc__.splitlines()[0], steps=4_000)
    parser.add_argument("--data", choices=("digits", "fashion_mnist"), default="digits")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where torchvision keeps its data sets")
    parser.add_argument("--batch", type=positive, default=8, help="images of a batch (default: 8)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are small
    images, labels = load(args.data, args.folder)
    held_out, images, labels = images[:HELD_OUT], images[HELD_OUT:], labels[HELD_OUT:]
    yardstick = Yardstick(images, labels)
    print(f"distance of held-out images: {yardstick.distance(held_out):.2f}")
    rows: list[Row] = []
    samples: Samples = {}
    for seed in range(args.seeds):
        for norm in dict.fromkeys(args.norm):
            new, shown = train(norm, seed, args.steps, args.batch, images, held_out, yardstick)
            rows += new
            if seed == 0:
                samples |= shown
            print(f"{norm:8} seed {seed}: distance at evaluation {new[-1].distance_eval:.2f}", flush=True)
            title = f"GAN on {args.data}, batches of {args.batch} (lines: mean, bands: range, seeds: {seed + 1})"
            save_csv(args.out / "gan.csv", Row._fields, rows)
            replace_file(args.out / "gan.png", partial(draw, rows=rows, samples=samples, title=title))
    print_table(rows)


if __name__ == "__main__":
    main()
