"""Training steps of a network on several processes, and what their layers send; written to workers.csv.

    python benchmarks/workers.py [--quick] [--out benchmarks/results]

One process per worker, one thread each, gloo between them, DistributedDataParallel around every model. The contenders
run interleaved, all workers starting each step together; a step's time is that of the slowest worker. With one process
the contenders are the blocks that say when running statistics move, and the monitor, which measures and sums up every
step. `workers-cost.csv` has what the layers of larger networks send per step, computed, for up to 1,000 workers.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import inception_v3, resnet18, resnet50

import contenders as c
import renorm
from csvfiles import Row, read_rows, write_machine, write_rows
from harness import Budget, Step, interleave
from machine import describe
from networks import NETWORKS, QUICK_NETWORKS, Network
from renorm.integrations.monitor import Monitor, monitor

(_NETWORK,) = (network for network in NETWORKS if network.name == "ResNet-18 CIFAR")
_ROUNDS = 30
_PROCESSES = (1, 2, 4)
_WORKERS = (2, 4, 8, 16, 50, 100, 250, 1_000)

_to_renorm = partial(renorm.convert, to=renorm.BatchRenorm, limits=renorm.Limits.constant(), report=lambda report: None)
_CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    c.BATCH_NORM: lambda model: model,
    c.APART: _to_renorm,
    c.MERGED: partial(_to_renorm, sync="running"),
    c.SHARED: partial(_to_renorm, sync="batch"),
}
_BLOCKS: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    c.NO_BLOCK: lambda model: nullcontext(),
    c.ACCUMULATE: renorm.accumulate,
    c.FREEZE: renorm.freeze,
}


@contextmanager
def summed_up(watch: Monitor) -> Iterator[None]:
    """Around a step of a model that is watched."""
    yield
    watch.compute()


class Counter:
    """Counts collectives and their bytes, those of DDP's C++ code apart."""

    def __init__(self) -> None:
        self.collectives = self.bytes = 0

    def __enter__(self) -> Counter:
        self._originals = dist.all_reduce, dist.all_gather
        dist.all_reduce, dist.all_gather = (self._counted(function) for function in self._originals)
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_reduce, dist.all_gather = self._originals

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            tensor = arguments[-1]
            self.collectives += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return function(*arguments, **options)

        return call


def network_step(model: nn.Module, images: torch.Tensor, block: Callable[[nn.Module], Any], together: bool) -> Step:
    """A training step that all workers start together.

    Args:
        model: the network, in DDP if there are several workers.
        images: a worker's batch.
        block: around forward and backward.
        together: whether there are other workers.

    Returns:
        The step.
    """
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step() -> dict[str, float]:
        if together:
            dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        with block(model):
            model(images).square().mean().backward()
        optimizer.step()
        return {"step": time.perf_counter() - start}

    return step


def steps_of(network: Network, processes: int, images: torch.Tensor) -> dict[str, Step]:
    """The contenders."""
    if processes == 1:
        models = {name: _model(network, c.APART) for name in (*_BLOCKS, c.MONITOR)}
        watch = monitor(models[c.MONITOR], every=1)
        blocks = _BLOCKS | {c.MONITOR: lambda model: summed_up(watch)}
        return {name: network_step(model, images, blocks[name], together=False) for name, model in models.items()}
    parallel = {name: DistributedDataParallel(_model(network, name)) for name in _CONVERSIONS}
    return {name: network_step(model, images, _BLOCKS[c.NO_BLOCK], together=True) for name, model in parallel.items()}


def _model(network: Network, conversion: str) -> nn.Module:
    torch.manual_seed(0)
    return _CONVERSIONS[conversion](network.build()).train()


def measure(rank: int, processes: int, port: int, quick: bool, out: Path) -> None:
    """What a process does; the first one writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    network = QUICK_NETWORKS[0] if quick else _NETWORK
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(network.batch, 3, network.size, network.size, generator=generator)
    steps = steps_of(network, processes, images)
    sent = {}
    for name, step in steps.items():
        step()
        with Counter() as counter:
            step()
        sent[name] = {"collectives": counter.collectives, "kilobytes": round(counter.bytes / 1e3, 1)}
    samples = interleave(steps, Budget(seconds=0, least_rounds=3 if quick else _ROUNDS, warmup=2))
    rows = []
    for name, sample in samples.items():
        everyone: list[list[float]] = [[] for _ in range(processes)]
        dist.all_gather_object(everyone, sample.seconds["step"])
        sample.seconds["step"] = [max(times) for times in zip(*everyone, strict=True)]
        rows.append(
            {"processes": processes, "network": network.name, "contender": name, **sample.row("step")} | sent[name]
        )
    if rank == 0:
        write_rows(out, rows)
    dist.destroy_process_group()


def measured(processes: int, quick: bool) -> list[Row]:
    """The rows of a number of processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        multiprocessing.spawn(measure, (processes, port, quick, path), nprocs=processes)
        return read_rows(path)


def costs() -> Iterator[Row]:
    """What the layers of a network send in a step: of each worker, by rings of the workers."""
    for make in (resnet18, resnet50, partial(inception_v3, init_weights=False)):
        model = _to_renorm(make())
        layers = [module for module in model.modules() if isinstance(module, renorm.Norm)]
        channels = sum(layer.num_features for layer in layers)
        gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
        for workers in _WORKERS:
            ring = 2 * (workers - 1) / workers  # how often a worker sends a buffer to sum it
            merged = ring * 8 * (2 * channels + 3 * len(layers))
            shared = (workers - 1) * 4 * (2 * channels + 2 * len(layers)) + ring * 4 * 2 * channels
            yield {
                "network": getattr(make, "__name__", "inception_v3"),
                "layers": len(layers),
                "channels": channels,
                "workers": workers,
                "gradients_megabytes": round(ring * gradients / 1e6, 2),
                "running_collectives": 1,
                "running_megabytes": round(merged / 1e6, 3),
                "batch_collectives": 2 * len(layers),
                "batch_megabytes": round(shared / 1e6, 3),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV files")
    parser.add_argument("--quick", action="store_true", help="few rounds on up to two processes, to try the script")
    options = parser.parse_args()
    rows: list[Row] = []
    for processes in _PROCESSES[:2] if options.quick else _PROCESSES:
        rows += measured(processes, options.quick)
        write_rows(options.out / "workers.csv", rows)
    for row in rows:
        print(*row.values(), sep="  ")
    write_rows(options.out / "workers-cost.csv", list(costs()))
    write_machine(options.out / "workers-machine.csv", describe("torchvision"))


if __name__ == "__main__":
    main()
