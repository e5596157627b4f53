"""What a paper's claims and numbers are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ANY = 0  # however many examples share statistics


@dataclass(frozen=True)
class Spot:
    """Where in a table of results an accuracy stands.

    Args:
        method: label of the method, up to its first comma.
        group: examples that share statistics; None for all of a forward pass, `ANY` for however many.
        few_classes: whether minibatches hold few classes, rather than independent examples.
        weighed: whether with example weighing.
        measure: name of an accuracy that is measured besides; "" for the test accuracy.
        fields: more fields of `Run` and their values.
    """

    method: str
    group: int | None = None
    few_classes: bool = False
    weighed: bool = False
    measure: str = ""
    fields: tuple[tuple[str, object], ...] = (("order", "shuffle"), ("variant", ""), ("frozen_share", 0.0))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a paper measured in.

    Args:
        name: for readers.
        run: fields of `Run` and their values.
        few_classes: more of them, of runs with few classes in a minibatch.
        least_steps: fewer training steps than that are another setting.
    """

    name: str
    run: Mapping[str, object] = field(default_factory=dict)
    few_classes: Mapping[str, object] = field(default_factory=dict)
    least_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Accuracies of a paper.

    Args:
        source: paper and section.
        recipes: names of the recipes that measure them anew.
        setting: what they were measured in.
        accuracies: in percent.
    """

    source: str
    recipes: tuple[str, ...]
    setting: Setting
    accuracies: Mapping[Spot, float]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The accuracy at `first` is above the one at `second`, or level with it.

    Args:
        text: for readers; claims that differ in numbers only have the same.
        source: paper and section.
        recipes: names of the recipes that test it.
        setting: what it was measured in.
        first: the larger.
        second: the smaller.
        difference: in points, if the paper tells it.
        level: the claim is that the two differ by nothing that matters.
        any_group: groups of another size, smaller than the minibatch, test it too.
        across: the two stand in different regimes.
    """

    text: str
    source: str
    recipes: tuple[str, ...]
    setting: Setting
    first: Spot
    second: Spot
    difference: float | None = None
    level: bool = False
    any_group: bool = False
    across: bool = False
