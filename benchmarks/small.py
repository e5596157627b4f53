"""Layers on tensors of a few KB, where the way to the kernels is most of the time, written to small.csv.

    python benchmarks/small.py [--quick] [--out benchmarks/results]

All layers of a case run interleaved in one process on one thread; times are the processor's, of one call, on average of
many. Ratios are over nn.BatchNorm2d, of two times of the same round, with median and quartiles of all rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

import contenders as c
import renorm
from command import run
from csvfiles import Row
from harness import Budget, Step, interleave, ratio
from settings import Setting

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    c.BATCH_NORM: nn.BatchNorm2d, c.OUR_BATCH: renorm.BatchNorm2d, c.OURS: renorm.BatchRenorm2d,
}  # fmt: skip
PHASES = ("training", "evaluation")
SHAPES = ((4, 16, 4, 4), (8, 32, 4, 4), (8, 32, 8, 8), (16, 64, 8, 8), (8, 32, 16, 16))
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_CALLS, _QUICK_CALLS = 200, 2
_BUDGET = Budget(seconds=4, least_rounds=25, warmup=3)
_QUICK_BUDGET = Budget(seconds=0, least_rounds=3, warmup=1)


def calls(layer: nn.Module, x: torch.Tensor, training: bool, number: int) -> Step:
    """Calls of a layer, forward and backward or evaluation.

    Args:
        layer: in any mode.
        x: input.
        training: whether it trains.
        number: of calls.

    Returns:
        A step with the part step, of one call.
    """
    dy = torch.randn_like(x)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(training)
    layer.train(training)

    def step() -> dict[str, float]:
        start = time.process_time()
        with torch.set_grad_enabled(training):
            for _ in range(number):
                y = layer(x)
                if training:
                    y.backward(dy)
        return {"step": (time.process_time() - start) / number}

    return step


def settings(quick: bool) -> list[Setting]:
    """One: kept memory and one thread."""
    return [Setting("kept", 1)]


def work(setting: Setting, quick: bool) -> Iterator[Row]:
    """Measure everything in this process."""
    for phase in PHASES:
        for layout, memory_format in _LAYOUTS.items():
            for shape in SHAPES[:1] if quick else SHAPES:
                x = torch.randn(shape).to(memory_format=memory_format)
                number = _QUICK_CALLS if quick else _CALLS
                steps = {name: calls(make(shape[1]), x, phase == "training", number) for name, make in LAYERS.items()}
                samples = interleave(steps, _QUICK_BUDGET if quick else _BUDGET)
                for name, found in samples.items():
                    case = {"phase": phase, "layout": layout, "shape": "x".join(map(str, shape)),
                            "kilobytes": x.numel() * 4 // 1024, "contender": name}  # fmt: skip
                    yield case | found.row("step") | ratio(found, samples[c.BATCH_NORM])


if __name__ == "__main__":
    run(__file__, __doc__, settings, work)
