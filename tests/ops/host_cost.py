"""What a layer's step costs the host, over the stub, in shares of nn.BatchNorm2d's on the CPU; a line of JSON each.

A process of its own, which begins again under the stub. Both sides' kernels do next to nothing: ours are not run, and
the input has a few KB. Contenders are interleaved; a figure is the smallest of many short bursts of the thread's time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from stub import driver
from torch import Tensor, nn

import renorm

_ROUNDS, _BURST = 60, 15
_SHAPE = (2, 64, 2, 2)


def steps(layer: nn.Module, residual: bool = False) -> dict[str, Callable[[], object]]:
    """A forward, and a forward with its backward."""
    x = torch.randn(_SHAPE).contiguous(memory_format=torch.channels_last).requires_grad_()
    given = (x, None, x.detach().clone(memory_format=torch.preserve_format)) if residual else (x,)
    dy, leaves = torch.ones_like(x).detach(), [x, *layer.parameters()]

    def forward() -> Tensor:
        y: Tensor = layer(*given)
        return y

    return {"forward": forward, "both": lambda: torch.autograd.grad(forward(), leaves, dy)}


def main() -> None:
    driver.ensure(Path(__file__), Path(tempfile.gettempdir()) / "renorm-stub", *sys.argv[1:])
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else _ROUNDS
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = steps(nn.BatchNorm2d(_SHAPE[1]).train())
    driver.activate()
    contenders = {
        "nn.BatchNorm2d": theirs,
        "BatchRenorm2d": steps(renorm.BatchRenorm2d(_SHAPE[1]).train()),
        "BatchNorm2d": steps(renorm.BatchNorm2d(_SHAPE[1]).train()),
        "BatchRenorm2d+relu+residual": steps(renorm.BatchRenorm2d(_SHAPE[1], act="relu").train(), residual=True),
    }
    best: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for name, functions in contenders.items():
            for direction, function in functions.items():
                function()
                start = time.thread_time_ns()
                for _ in range(_BURST):
                    function()
                seconds = (time.thread_time_ns() - start) / _BURST / 1e3
                best[name, direction] = min(best.get((name, direction), seconds), seconds)
    for (name, direction), microseconds in best.items():
        share = microseconds / best["nn.BatchNorm2d", direction]
        print(
            json.dumps({"layer": name, "direction": direction, "us": round(microseconds, 1), "share": round(share, 3)})
        )


if __name__ == "__main__":
    main()
