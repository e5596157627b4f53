"""The four improvements together, at every batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jsonargparse.typing import PositiveFloat, PositiveInt

from ..data import Dataset
from ..networks.methods import METHODS, MethodName
from ..recipe import SMALL, SUMMERS, TINY, Scales
from ..runs import Decay, Run
from .smallbatch import SmallBatch


@dataclass(frozen=True, kw_only=True)
class AllFour(SmallBatch):
    """Compare the methods with all four improvements together: grouping by batch size, decay, and weighing.

    All four are ghost batch norm from 4 examples on, batch-group norm at 2 and group norm at 1, with gamma and beta
    decayed, as the column "on" says. Alone, the methods do not decay gamma and beta. Not the paper's are
    batch renorm within closer limits, and a further row: batch-group norm with batch renorm's correction.

    Args:
        ghost_size: most examples that share statistics in ghost batch norm; a batch has two groups at least.
        weight_decay: of weights, and of gamma and beta in all four.
    """

    name: ClassVar[str] = "allfour"
    title: ClassVar[str] = "All four improvements"
    claim: ClassVar[str] = "better than batch norm and group norm at every batch size from 1 to 128"
    source: ClassVar[str] = "Summers & Dinneen 2020, 4.2"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"batch_sizes": (32, 2), "reference_size": 32},
        "small": SMALL | {"steps": 400, "batch_sizes": (128, 32, 8, 2)},
        "paper": SUMMERS,
    }

    methods: tuple[MethodName, ...] = ("batch_norm", "group_norm", "batch_renorm", "batch_renorm_close")
    batch_sizes: tuple[PositiveInt, ...] = (128, 64, 32, 16, 8, 4, 2, 1)
    ghost_size: PositiveInt = 16
    weight_decay: PositiveFloat = 5e-4

    def runs(self, dataset: Dataset) -> list[Run]:
        lines: list[tuple[str, MethodName | None, Decay]] = [
            *((METHODS[method].label, method, "none") for method in self.methods),
            ("all four", None, "all"),
            ("batch-group norm + limits, decay", "batch_group_renorm", "all"),
        ]
        return [
            self.sized_run(dataset, method, group, label=label, size=size, seed=seed, norm_decay=decay)
            for label, named, decay in lines
            for size in self.batch_sizes
            for method, group in (self._grouping(named, size),)
            for seed in self.seed_numbers
            if (method, size) != ("batch_norm", 1)
        ]

    def _grouping(self, method: MethodName | None, size: int) -> tuple[MethodName, int | None]:
        """A method and its examples that share statistics; None is all four."""
        if method is not None:
            return method, self._group(method, size)
        if size > 2:
            return "ghost_batch_norm", min(self.ghost_size, size // 2)
        return ("group_norm", 1) if size == 1 else ("batch_group_norm", 2)
