"""One side of regression.py: measures the version of renorm that it finds, case by case, when asked.

Prints a line of JSON with the cases first, and then for each name of a case that it reads a line with the seconds of a
step. It may meet an older version than the scripts beside it, and uses public names only. The network is the working
tree's for both.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn

import renorm
from contenders import EAGER, EVALUATED, GROUPINGS, OUR_BATCH_GROUP, OUR_GHOST, OURS, OURS_WEIGHTED
from harness import Step
from renorm_lab.networks.models import resnet
from shapes import LAYOUTS
from steps import eval_step, network_step, train_step

_VISIT_SECONDS = 0.02
_LEAST_STEPS = 5
_SIZES = ((8, 512, 4, 4), (32, 256, 8, 8), (32, 64, 32, 32), (8, 256, 56, 56))


def _input(sizes: tuple[int, ...], layout: str) -> torch.Tensor:
    return torch.randn(sizes).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def _training(name: str, sizes: tuple[int, ...], layout: str, relu: bool, residual: bool) -> Step:
    layer = (EAGER | GROUPINGS)[name](sizes[1], relu)
    return train_step(layer, _input(sizes, layout), _input(sizes, layout) if residual else None)


def _evaluation(name: str, sizes: tuple[int, ...]) -> Step:
    return eval_step(EVALUATED[name](sizes[1], False).eval(), _input(sizes, "contiguous"))


def _network() -> Step:
    model = resnet(8, 3, 32, nn.BatchNorm2d)
    renorm.convert(model, renorm.BatchRenorm, limits=renorm.Limits.constant())
    return network_step(model, torch.randn(32, 3, 32, 32))


def cases() -> dict[str, Callable[[], Step]]:
    """The cases by name, to be built when they are asked for."""
    found: dict[str, Callable[[], Step]] = {"ResNet-8 step": _network}
    for sizes in _SIZES:
        shape = "x".join(map(str, sizes))
        for layout in LAYOUTS:
            for ending, relu, residual in (("", False, False), ("+residual+relu", True, True)):
                name = f"{OURS}{ending}, {shape} {layout}"
                found[name] = partial(_training, OURS, sizes, layout, relu, residual)
    for contender in (OUR_GHOST, OUR_BATCH_GROUP):
        name = f"{contender}, 32x64x32x32 contiguous"
        found[name] = partial(_training, contender, (32, 64, 32, 32), "contiguous", False, False)
    for contender in (OURS, OURS_WEIGHTED):
        name = f"inference of {contender}, 32x64x32x32 contiguous"
        found[name] = partial(_evaluation, contender, (32, 64, 32, 32))
    return found


def has_kernels() -> bool:
    """Whether this version has C++ kernels, and they were built."""
    if importlib.util.find_spec("renorm.ops.backends") is not None:
        from renorm.ops import backends

        return backends.available["cpu"]
    if importlib.util.find_spec("renorm.ops.extension") is None:
        return False
    from renorm.ops import extension  # of commits from before there was a table of backends

    return extension.available()


def visit(step: Step) -> float:
    """Seconds of the fastest of a few steps: what else runs on the machine can only make a step slower."""
    step()  # finds the caches full of what ran before
    seconds: list[float] = []
    deadline = time.perf_counter() + _VISIT_SECONDS
    while len(seconds) < _LEAST_STEPS or time.perf_counter() < deadline:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = cases()

    @cache
    def built(name: str) -> Step:
        return found[name]()

    print(json.dumps({"cases": list(found), "kernels": has_kernels(), "version": renorm.__file__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(visit(built(line.strip()))), flush=True)


if __name__ == "__main__":
    main()
