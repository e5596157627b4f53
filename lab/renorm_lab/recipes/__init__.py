"""The recipes: one file for each experiment."""

from __future__ import annotations

from ..recipe import Recipe
from .ablation import Ablation
from .allfour import AllFour
from .baseline import Baseline
from .combination import Combination
from .decay import WeightDecay
from .finetune import Finetune
from .ghost import Ghost
from .metric import Metric
from .microbatch import Microbatch
from .negative import Negative
from .noniid import NonIid
from .noniid_classes import NonIidClasses
from .range import Range
from .smallbatch import SmallBatch
from .weigh import Weigh

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Baseline,
        Microbatch,
        NonIid,
        NonIidClasses,
        Weigh,
        Ghost,
        WeightDecay,
        SmallBatch,
        AllFour,
        Combination,
        Finetune,
        Range,
        Ablation,
        Negative,
        Metric,
    )
}
