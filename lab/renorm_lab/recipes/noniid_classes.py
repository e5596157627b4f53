"""Table 1 of the second paper: minibatches of four classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jsonargparse.typing import PositiveInt

from ..networks.methods import MethodName
from ..recipe import SMALL, SUMMERS, TINY, Scales
from .noniid import NonIid


@dataclass(frozen=True, kw_only=True)
class NonIidClasses(NonIid):
    """Train on minibatches of 4 classes x 32 examples, and compare the methods with and without example weighing.

    Small networks learn nothing from such minibatches in a few thousand steps: small takes 16 classes x 4 examples.
    """

    name: ClassVar[str] = "noniid-classes"
    title: ClassVar[str] = "Minibatches of few classes"
    claim: ClassVar[str] = "40.1% for batch norm, 69.0 for batch renorm, 75.2 for batch-group norm; weighing gains most"
    source: ClassVar[str] = "Summers & Dinneen 2020, 4.4, table 1"
    scales: ClassVar[Scales] = {
        "tiny": TINY | {"ghost_sizes": (64, 2)},
        "small": SMALL | {"classes_per_batch": 16, "examples_per_class": 4, "ghost_sizes": (32, 16, 8, 4, 2)},
        "paper": SUMMERS,
    }

    methods: tuple[MethodName, ...] = ("batch_norm", "batch_renorm", "ghost_batch_norm", "batch_group_norm")
    classes_per_batch: PositiveInt = 4
    examples_per_class: PositiveInt = 32
    replacement: bool = True
    independent: bool = False
    ghost_sizes: tuple[PositiveInt, ...] = (64, 32, 16, 8, 4, 2)
