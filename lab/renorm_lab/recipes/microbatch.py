"""Statistics over a part of the minibatch, as on several devices, with one gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..networks.methods import MethodName
from ..recipe import IOFFE, SMALL, TINY, Recipe, Scales
from ..runs import Run


@dataclass(frozen=True, kw_only=True)
class Microbatch(Recipe):
    """Normalize by ever fewer examples of the same minibatches, and compare the normalization methods.

    Ghost batch norm is batch norm over microbatches, so that it has no row of its own here unless asked for; the two
    would differ only in how the running variance moves.

    Args:
        batch_size: examples in a minibatch, which gives one gradient.
        forward_size: examples in a forward pass, by default all of the minibatch. With fewer, gradients are added up
            over several forwards, and the running statistics move once, as if each forward were a worker:
            --batch_size 1600 --forward_size 32 is the paper's arrangement of 50 workers.
        group_sizes: examples that share statistics, two columns of the table each.
    """

    name: ClassVar[str] = "microbatch"
    title: ClassVar[str] = "Statistics over microbatches"
    claim: ClassVar[str] = "over 4 examples of 32 batch norm falls from 78.3 to 74.2%, batch renorm to 76.5%"
    source: ClassVar[str] = "Ioffe 2017, 4.2"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"group_sizes": (32, 4)},
        "small": SMALL | {"steps": 2_000, "group_sizes": (32, 16, 8, 4, 2)},
        "paper": IOFFE
        | {"methods": ("batch_norm", "batch_renorm"), "batch_size": 1_600, "forward_size": 32, "group_sizes": (32, 4)},
    }

    methods: tuple[MethodName, ...] = ("batch_norm", "batch_renorm", "batch_group_norm", "batch_group_renorm")
    batch_size: PositiveInt = 32
    forward_size: PositiveInt | None = None
    group_sizes: tuple[PositiveInt, ...] = (32, 8, 4, 2)

    def runs(self, dataset: Dataset) -> list[Run]:
        sizes = {"batch_size": self.batch_size, "forward_size": self.forward_size}
        return [
            self.make_run(dataset, method, size, regime=f"n = {size}", seed=seed, **sizes)
            for method in self.methods
            for size in self.group_sizes
            for seed in self.seed_numbers
        ]
