"""What the second paper tried without success."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jsonargparse.typing import PositiveInt

from ..data import Dataset
from ..networks.methods import MethodName
from ..networks.variants import VARIANTS
from ..recipe import SMALL, SUMMERS, TINY, Recipe, Scales
from ..runs import Run


@dataclass(frozen=True, kw_only=True)
class Negative(Recipe):
    """Estimate batch norm's statistics anew, and make group norm stochastic or its groups even, none of which helped.

    Statistics are estimated on training images without augmentation and on test images; the noise, the random
    groups and the number of groups that changes during training are in the layers' training alone.

    Args:
        batch_size: examples in a minibatch.
        variants: changes to group norm, one row of the table for each.
    """

    name: ClassVar[str] = "negative"
    title: ClassVar[str] = "What did not help"
    claim: ClassVar[str] = "statistics without augmentation cost 0.5 points; stochastic group norm does not work"
    source: ClassVar[str] = "Summers & Dinneen 2020, appendix C"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"model": "resnet8"},
        "small": SMALL | {"steps": 1_500},
        "paper": SUMMERS,
    }

    methods: tuple[MethodName, ...] = ("batch_norm", "group_norm")
    batch_size: PositiveInt = 128
    variants: tuple[str, ...] = tuple(VARIANTS)

    def runs(self, dataset: Dataset) -> list[Run]:
        lines: list[tuple[MethodName, str | None, dict[str, Any]]] = [
            *((method, None, {"measures": "estimates"} if method == "batch_norm" else {}) for method in self.methods),
            *(("group_norm", f"group norm, {variant}", {"variant": variant}) for variant in self.variants),
        ]
        return [
            self.make_run(
                dataset, method, None, label=label, regime="i.i.d.", batch_size=self.batch_size, seed=seed, **changes,
            )
            for method, label, changes in lines
            for seed in self.seed_numbers
        ]  # fmt: skip
