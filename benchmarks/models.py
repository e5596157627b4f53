"""Images per second and memory of whole training steps, written to models.csv.

    python benchmarks/models.py [--quick] [--out benchmarks/results]

The variants of a network run interleaved in one process; there is one process for each allocator setting and number of
threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from command import run
from csvfiles import Row
from harness import Budget, Step, interleave
from memory import peak_bytes
from networks import COMPILED, NETWORKS, QUICK_NETWORKS, VARIANTS, Change, Network
from settings import Setting, thread_counts
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


def variants(network: Network, setting: Setting) -> dict[str, Change]:
    """The variants that take part: compiled ones once, since each takes a minute to compile."""
    return VARIANTS | (COMPILED if network.compiled and setting == Setting("kept", 1) else {})


def measure(network: Network, setting: Setting, budget: Budget) -> Iterator[Row]:
    """Time the training steps of a network's variants.

    Args:
        network: the network.
        setting: of this process.
        budget: how long.

    Yields:
        A row for each variant.
    """
    steps = {name: training_step(network, change) for name, change in variants(network, setting).items()}
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


def training_step(network: Network, change: Change) -> Step:
    """A step of a variant of a network; weights and images are the same for all of them."""
    torch.manual_seed(0)
    model = change(network.build()).train()
    return network_step(model, torch.randn(network.batch, 3, network.size, network.size))


def work(setting: Setting, quick: bool) -> Iterator[Row]:
    """Measure everything of a setting in this process."""
    for network in networks(setting, quick):
        yield from measure(network, setting, _QUICK_BUDGET if quick else _BUDGET)


if __name__ == "__main__":
    run(__file__, __doc__, settings, work, "timm", "torchvision")
