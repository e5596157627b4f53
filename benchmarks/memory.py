"""Memory of norm + ReLU in training, written to memory.csv.

    python benchmarks/memory.py [--quick] [--out benchmarks/results]

Saved: bytes of the distinct storages that forward saves for backward, input and output counted where they are saved,
parameters and buffers not. Peak: the most that forward has allocated at a time, its output counted, its input not.
Both are the same in every run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import contenders
from csvfiles import Row, write_rows
from shapes import LAYOUTS, shapes

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or every profile prints two lines


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a layer keeps for backward.

    Args:
        layer: called once, in training.
        x: its input.

    Returns:
        Bytes of distinct storages, without those of the layer's parameters and buffers.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    saved = sum(size for storage, size in sizes.items() if storage not in own)
    del y  # until here, or its memory could have been used, and counted, twice
    return saved


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory of tensors that a call has allocated at a time, beyond what was there before.

    Args:
        call: what to watch.

    Returns:
        Bytes, of what torch's allocator on the CPU has seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = call()
    del result
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def measure(quick: bool) -> Iterator[Row]:
    """The rows of all core inputs."""
    for shape in shapes(quick):
        if not shape.core:
            continue
        for layout in LAYOUTS:
            x = shape.tensor(layout)
            for name, make in contenders.EAGER.items():
                layer = make(x.shape[1], True)
                layer(x)  # what is allocated once is no part of it
                yield {
                    "shape": shape.name,
                    "megabytes": round(shape.megabytes, 3),
                    "layout": layout,
                    "contender": name,
                    "saved_megabytes": round(saved_bytes(layer, x) / 1e6, 4),
                    "peak_megabytes": round(peak_bytes(partial(layer, x)) / 1e6, 4),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV file")
    parser.add_argument("--quick", action="store_true", help="tiny inputs, to try the script")
    options = parser.parse_args()
    rows = list(measure(options.quick))
    for row in rows:
        print(*row.values(), sep="  ")
    write_rows(options.out / "memory.csv", rows)


if __name__ == "__main__":
    main()
