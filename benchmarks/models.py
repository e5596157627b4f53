"""Images per second and memory of whole training steps, written to models.csv.

    python benchmarks/models.py [--quick] [--out benchmarks/results]

The variants of a network run interleaved in one process; there is one process for each allocator setting and number of
threads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from csvfiles import Row, write_machine, write_rows
from harness import Budget, Step, interleave
from machine import describe
from memory import peak_bytes
from networks import NETWORKS, QUICK_NETWORKS, VARIANTS, Network
from settings import Setting, measure_with, thread_counts
from steps import network_step

_BUDGET = Budget(seconds=10, warmup=1)
_QUICK_BUDGET = Budget(seconds=0, least_rounds=3, warmup=1)


def settings(quick: bool) -> list[Setting]:
    """Kept memory with each number of threads, the default allocator with one; one of these to try the script."""
    if quick:
        return [Setting("kept", 1)]
    return [*(Setting("kept", threads) for threads in thread_counts()), Setting("default", 1)]


def networks(setting: Setting, quick: bool) -> list[Network]:
    """The networks of a setting: all of them with kept memory, the barred ones with the default allocator too."""
    if quick:
        return list(QUICK_NETWORKS)
    return [network for network in NETWORKS if network.barred or setting.allocator == "kept"]


def measure(network: Network, budget: Budget) -> Iterator[Row]:
    """Time the training steps of a network's variants.

    Args:
        network: the network.
        budget: how long.

    Yields:
        A row for each variant.
    """
    steps = {name: training_step(network, change) for name, change in VARIANTS.items()}
    peaks = {}
    for name, step in steps.items():
        step()  # the optimizer's memory stays from here on
        peaks[name] = peak_bytes(step)
    for name, samples in interleave(steps, budget).items():
        times = samples.row("step")
        yield {
            "network": network.name,
            "batch": network.batch,
            "size": network.size,
            "contender": name,
            **times,
            "images_per_second": round(1e3 * network.batch / float(times["median_ms"]), 2),
            "peak_megabytes": round(peaks[name] / 1e6, 2),
        }


def training_step(network: Network, change: Callable[[nn.Module], nn.Module]) -> Step:
    """A step of a variant of a network; weights and images are the same for all of them."""
    torch.manual_seed(0)
    model = change(network.build()).train()
    return network_step(model, torch.randn(network.batch, 3, network.size, network.size))


def work(setting: Setting, quick: bool) -> None:
    """Measure everything of a setting in this process, and print rows as JSON."""
    torch.set_num_threads(setting.threads)
    for network in networks(setting, quick):
        for row in measure(network, _QUICK_BUDGET if quick else _BUDGET):
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV files")
    parser.add_argument("--quick", action="store_true", help="one small network and few rounds, to try the script")
    parser.add_argument("--worker", nargs=2, metavar=("ALLOCATOR", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        allocator, threads = options.worker
        work(Setting(allocator, int(threads)), options.quick)
        return
    rows = []
    for setting in settings(options.quick):
        for row in measure_with(setting, __file__, ["--quick"] * options.quick):
            rows.append(row)
            print(*row.values(), sep="  ", flush=True)
        write_rows(options.out / "models.csv", rows)  # an interrupted run keeps what it has
    write_machine(options.out / "models-machine.csv", describe("timm", "torchvision"))


if __name__ == "__main__":
    main()
