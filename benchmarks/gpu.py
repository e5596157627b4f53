"""Times of layers and training steps on a GPU, written to gpu-layers.csv and gpu-models.csv; and the ratios, printed.

    python benchmarks/gpu.py [--quick] [--device cuda] [--out benchmarks/results]

What is timed lies between events of the device, with its cache flushed before every step, so that the gaps between
launches count as they do in training. Contenders are interleaved round by round in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import contenders as c
from csvfiles import Row, write_machine, write_rows
from harness import Budget, Step, interleave
from machine import describe
from ratios import mean, ratios, select, worst
from shapes import LAYOUTS, Shape, shapes

_BUDGET = Budget(seconds=0.1, least_rounds=11, warmup=4)
_MODEL_BUDGET = Budget(seconds=4, least_rounds=7, warmup=4)
_QUICK_BUDGET = Budget(seconds=0, least_rounds=3, warmup=1)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_VARIANTS = {
    "norm": (False, False),
    "norm+residual+relu": (True, True),
}  # whether ReLU follows, and a residual is added
_NETWORKS = ("ResNet-50", "Inception-v3")
_FLUSHED_BYTES = 256_000_000  # more than any second-level cache
_BATCH_FACTOR = 4  # a GPU is given larger batches than a CPU
_MODEL_BATCH = 128
_LARGE_MB, _COPY_BOUND_MB = 1, 64


def timed(device: torch.device, **parts: Callable[[Any], Any]) -> Step:
    """A step whose parts are timed on the device.

    Args:
        device: where the work is done.
        **parts: called one after the other, each with what the one before returned.

    Returns:
        A step with these parts and, where there are several, their sum, "both".
    """
    on_gpu = device.type == "cuda"
    flushed = torch.empty(_FLUSHED_BYTES if on_gpu else 1, dtype=torch.int8, device=device)

    def mark() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(start: Any, end: Any) -> float:
        seconds: float = start.elapsed_time(end) / 1e3 if on_gpu else end - start
        return seconds

    def step() -> dict[str, float]:
        flushed.zero_()
        marks, value = [mark()], None
        for part in parts.values():
            value = part(value)
            marks.append(mark())
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = {name: between(*pair) for name, pair in zip(parts, pairwise(marks), strict=True)}
        return seconds | ({"both": between(marks[0], marks[-1])} if len(parts) > 1 else {})

    return step


def layer_rows(
    shape: Shape, layout: str, dtype: str, variant: str, device: torch.device, budget: Budget
) -> Iterator[Row]:
    """Time the contenders on an input.

    Args:
        shape: the input's.
        layout: the input's.
        dtype: the input's; parameters are float32.
        variant: one of norm and norm+residual+relu.
        device: where.
        budget: how long.

    Yields:
        A row for each contender and direction.
    """
    torch.manual_seed(0)
    relu, with_residual = _VARIANTS[variant]

    def tensor() -> torch.Tensor:
        memory_format = LAYOUTS[layout]
        values = torch.randn(shape.sizes, device=device, dtype=_DTYPES[dtype])
        return values.contiguous(memory_format=memory_format).requires_grad_()

    x, dy = tensor(), tensor().detach()
    extra = {"residual": tensor()} if with_residual else {}
    copied = x.detach()
    steps = {c.COPY: timed(device, forward=lambda _: copied.clone())}
    for name, make in c.EAGER.items():
        layer = make(shape.sizes[1], relu).to(device)
        leaves = (x, *extra.values(), *layer.parameters())
        steps[name] = timed(
            device,
            forward=lambda _, layer=layer: layer(x, **extra),
            backward=lambda y, leaves=leaves: torch.autograd.grad(y, leaves, dy),
        )
    for name, samples in interleave(steps, budget).items():
        for direction in samples.seconds:
            yield {
                "network": shape.network, "shape": shape.name, "megabytes": round(x.nbytes / 1e6, 3), "layout": layout,
                "dtype": dtype, "variant": variant, "contender": name, "direction": direction,
            } | samples.row(direction)  # fmt: skip


def model_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Time training steps of ResNet-50 in bfloat16 and channels_last, eager and compiled.

    Args:
        device: where.
        quick: a small network and few rounds instead.

    Yields:
        A row for each variant; none without timm and torchvision, which the networks come from.
    """
    try:
        from networks import COMPILED, NETWORKS, QUICK_NETWORKS, VARIANTS
    except ImportError as error:
        print(f"without training steps: {error}")
        return
    network = QUICK_NETWORKS[0] if quick else next(n for n in NETWORKS if n.name == "ResNet-50")
    batch, budget = (network.batch, _QUICK_BUDGET) if quick else (_MODEL_BATCH, _MODEL_BUDGET)
    images = torch.randn(batch, 3, network.size, network.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 100
    steps = {}
    for name, change in (VARIANTS if quick else VARIANTS | COMPILED).items():
        torch.manual_seed(0)
        model = change(network.build()).train().to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step(_: Any, model: nn.Module = model, optimizer: Any = optimizer) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = timed(device, step=step)
    for name, samples in interleave(steps, budget).items():
        yield {"network": network.name, "batch": batch, "size": network.size, "contender": name} | samples.row("step")


def bandwidth_shares(rows: list[Row]) -> list[float]:
    """Bytes that ours must move, forward and backward, over its time, in shares of the copy's bandwidth.

    Forward reads x twice and writes y; backward reads x and dy twice and writes dx.
    """
    copies = {_case(row): float(row["median_ms"]) for row in select(rows, contender=c.COPY, direction="forward")}
    both = select(rows, contender=c.OURS, direction="both", variant="norm")
    passes, of_copy = 3 + 5, 2
    shares = {_case(row): passes / of_copy * copies[_case(row)] / float(row["median_ms"]) for row in both}
    return [share for case, share in shares.items() if float(case[1]) > _COPY_BOUND_MB]


def _case(row: Row) -> tuple[Any, ...]:
    return row["shape"], row["megabytes"], row["layout"], row["dtype"], row["variant"]


def report(layers: list[Row], models: list[Row]) -> Iterator[str]:
    """The ratios that bars are set for, a line each."""
    both = [row for row in select(layers, direction="both") if float(row["megabytes"]) >= _LARGE_MB]
    for variant in _VARIANTS:
        for dtype in _DTYPES:
            for layout in LAYOUTS:
                rows = select(both, variant=variant, dtype=dtype, layout=layout)
                for other in (c.BATCH_NORM, c.PLAIN):
                    values = ratios(rows, c.OURS, other)
                    if values:
                        name = f"{c.OURS} / {other}, {variant}, {dtype}, {layout}"
                        yield f"{name}: {mean(values):.2f}, worst {worst(values)}"
    shares = bandwidth_shares(layers)
    if shares:
        yield f"share of the copy's bandwidth over {_COPY_BOUND_MB} MB: {min(shares):.2f} to {max(shares):.2f}"
    for above, below in (
        (c.OURS, c.BATCH_NORM), (c.OURS_FUSED, c.BATCH_NORM), (c.OURS_COMPILED, c.BATCH_NORM_COMPILED),
        (c.OURS_COMPILED, c.OURS), (c.OURS, c.PLAIN),
    ):  # fmt: skip
        for ratio in ratios(models, above, below):
            yield f"training step, {above} / {below}: {ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV files")
    parser.add_argument("--quick", action="store_true", help="tiny inputs and few rounds, to try the script")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="where, cuda by default")
    options = parser.parse_args()
    wanted = [shape for shape in shapes(options.quick) if options.quick or shape.network in _NETWORKS]
    layers: list[Row] = []
    for shape in wanted:
        sizes = (shape.sizes[0] * (1 if options.quick else _BATCH_FACTOR), *shape.sizes[1:])
        larger = Shape(shape.network, sizes, shape.core)
        for layout in LAYOUTS:
            for dtype in _DTYPES:
                for variant in _VARIANTS:
                    budget = _QUICK_BUDGET if options.quick else _BUDGET
                    layers += layer_rows(larger, layout, dtype, variant, options.device, budget)
        write_rows(options.out / "gpu-layers.csv", layers)
    models = list(model_rows(options.device, options.quick))
    if models:
        write_rows(options.out / "gpu-models.csv", models)
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "none"
    write_machine(options.out / "gpu-machine.csv", describe() | {"gpu": name})
    print("\n".join(report(layers, models)))


if __name__ == "__main__":
    main()
