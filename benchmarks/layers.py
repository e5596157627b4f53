"""Time of a training step, ours against nn.BatchNorm, contenders interleaved round by round in one process.

    python benchmarks/layers.py [--threads 1] [--rounds 30] [--csv benchmarks/results/layers.csv]

Prints medians and the ratio to nn.BatchNorm: for single layers (forward and backward) in both memory formats, and for
training steps of timm's resnet18 with every layer converted.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from torch import nn

import renorm

SHAPES = [(32, 64, 32, 32), (32, 128, 16, 16), (32, 256, 8, 8), (32, 64, 56, 56), (16, 256, 28, 28)]
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "nn.BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm2d": renorm.BatchNorm2d,
    "BatchRenorm2d": lambda channels: renorm.BatchRenorm2d(channels, limits=renorm.Limits.constant()),
    "GhostBatchNorm2d": lambda channels: renorm.GhostBatchNorm2d(channels, 8),
    "BatchGroupNorm2d": lambda channels: renorm.BatchGroupNorm2d(channels, 16),
}


def interleaved(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every contender, after three rounds of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 3):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def layer_step(make: Callable[[int], nn.Module], x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    layer = make(x.shape[1])

    def step() -> None:
        x.grad = None
        layer(x).backward(dy)

    return step


def layer_rows(rounds: int) -> Iterator[dict[str, object]]:
    for shape in SHAPES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
            dy = torch.randn_like(x)
            steps = {name: layer_step(make, x, dy) for name, make in LAYERS.items()}
            subject = f"{'x'.join(map(str, shape))} {str(memory_format).removeprefix('torch.')}"
            yield from rows(subject, interleaved(steps, rounds))


def model_rows(rounds: int) -> Iterator[dict[str, object]]:
    def step_of(convert: Callable[[nn.Module], nn.Module]) -> Callable[[], None]:
        torch.manual_seed(0)
        model = convert(timm.create_model("resnet18", num_classes=100))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        images, labels = torch.randn(16, 3, 96, 96), torch.randint(100, (16,))

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return step

    limits = renorm.Limits.constant()
    steps = {
        "nn.BatchNorm2d": step_of(lambda model: model),
        "BatchRenorm2d": step_of(lambda model: renorm.convert(model, renorm.BatchRenorm, limits=limits)),
    }
    yield from rows("resnet18 step, 16 images of 96x96", interleaved(steps, rounds))


def rows(subject: str, seconds: dict[str, list[float]]) -> Iterator[dict[str, object]]:
    base = statistics.median(seconds["nn.BatchNorm2d"])
    for name, times in seconds.items():
        quartiles = statistics.quantiles(times, n=4)
        yield {
            "subject": subject,
            "contender": name,
            "threads": torch.get_num_threads(),
            "median_ms": round(quartiles[1] * 1e3, 3),
            "lower_quartile_ms": round(quartiles[0] * 1e3, 3),
            "upper_quartile_ms": round(quartiles[2] * 1e3, 3),
            "ratio": round(statistics.median(times) / base, 3),
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for row in (*layer_rows(options.rounds), *model_rows(max(5, options.rounds // 3))):
        results.append(row)
        print(f"{row['subject']:45} {row['contender']:18} {row['median_ms']:9.3f} ms  x{row['ratio']:.2f}")
    if options.csv is None:
        return
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(results)


if __name__ == "__main__":
    sys.exit(main())
