"""Times of single layers, ours against torch's and plain code, written to layers.csv.

    python benchmarks/layers.py [--quick] [--out benchmarks/results]

Every case (input, layout, with or without ReLU and residual) runs all contenders interleaved in one process; there is
one process for each allocator setting and number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

import contenders
from command import run
from csvfiles import Row
from harness import Budget, interleave
from settings import ALLOCATORS, Setting, thread_counts
from shapes import LAYOUTS, Shape, shapes
from steps import copy_step, eval_step, train_step

_BUDGET = Budget(seconds=0.3)
_QUICK_BUDGET = Budget(seconds=0, least_rounds=3, warmup=1)
_DEFAULT_ALLOCATOR_MB = 30
_VARIANTS = {  # whether ReLU follows, and whether a residual is added before
    "norm": (False, False),
    "norm+relu": (True, False),
    "norm+residual": (False, True),
    "norm+residual+relu": (True, True),
}


@dataclass(frozen=True)
class Case:
    """What contenders are compared on.

    Args:
        shape: the input's.
        layout: the input's.
        mode: "train" or "eval".
        variant: one of `_VARIANTS`.
    """

    shape: Shape
    layout: str
    mode: str
    variant: str

    @property
    def row(self) -> Row:
        """The columns that name the case."""
        return {
            "network": self.shape.network,
            "shape": self.shape.name,
            "megabytes": round(self.shape.megabytes, 3),
            "layout": self.layout,
            "mode": self.mode,
            "variant": self.variant,
        }


def settings(quick: bool) -> list[Setting]:
    """Both allocator settings, with each number of threads; two of these to try the script."""
    counts = thread_counts()
    if quick:
        return [Setting("kept", counts[0]), Setting("default", counts[-1])]
    return [Setting(allocator, threads) for allocator in ALLOCATORS for threads in counts]


def cases(setting: Setting, quick: bool) -> Iterator[Case]:
    """The cases of a setting.

    With kept memory all inputs are measured, and those of the core also with a residual and in evaluation. With the
    default allocator it is the core as far as it is small: the page faults of a large input take seconds.
    """
    kept = setting.allocator == "kept"
    for shape in shapes(quick):
        if not kept and not (shape.core and shape.megabytes < _DEFAULT_ALLOCATOR_MB):
            continue
        for layout in LAYOUTS:
            for variant, (_, residual) in _VARIANTS.items():
                if not residual or (kept and shape.core):
                    yield Case(shape, layout, "train", variant)
            if kept and shape.core:
                yield Case(shape, layout, "eval", "norm")


def makers(case: Case, setting: Setting) -> dict[str, contenders.Make]:
    """The layers that take part in a case, by name."""
    if case.mode == "eval":
        return contenders.EVALUATED
    chosen = dict(contenders.EAGER)
    if case.layout == "channels_last" and "residual" not in case.variant:
        chosen |= contenders.ANCHOR
    if case.variant == "norm" and setting.threads == 1:
        chosen |= contenders.GROUPINGS
    # Only there, since each takes seconds to compile.
    if case.shape.core and setting == Setting("kept", 1) and "residual" not in case.variant:
        chosen |= contenders.COMPILED
    return chosen


def measure(case: Case, setting: Setting, budget: Budget) -> Iterator[Row]:
    """Run a case.

    Args:
        case: what to measure.
        setting: of this process.
        budget: how long.

    Yields:
        A row for each contender and direction.
    """
    torch._dynamo.reset()  # or the compiler meets its limit of variants of a function, and falls back to eager
    torch.manual_seed(0)
    relu, with_residual = _VARIANTS[case.variant]
    x = case.shape.tensor(case.layout)
    residual = case.shape.tensor(case.layout) if with_residual else None
    steps = {contenders.COPY: copy_step(x)}
    for name, make in makers(case, setting).items():
        layer = make(x.shape[1], relu)
        steps[name] = eval_step(layer.eval(), x) if case.mode == "eval" else train_step(layer, x, residual)
    for name, samples in interleave(steps, budget).items():
        for direction in samples.seconds:
            yield case.row | {"contender": name, "direction": direction} | samples.row(direction)


def work(setting: Setting, quick: bool) -> Iterator[Row]:
    """Measure everything of a setting in this process."""
    for case in cases(setting, quick):
        yield from measure(case, setting, _QUICK_BUDGET if quick else _BUDGET)


if __name__ == "__main__":
    run(__file__, __doc__, settings, work)
