"""What a conversion did, to be printed."""

from __future__ import annotations

from dataclasses import dataclass

from ..fusion.sites import Fused, NotFused


@dataclass(frozen=True)
class Replacement:
    """A layer that was replaced.

    Args:
        name: its name in the model.
        before: class before.
        after: class after.
        momentum: momentum before and after; None for the cumulative average, and before for group norm.
        note: what else the user should know.
    """

    name: str
    before: str
    after: str
    momentum: tuple[float | None, float | None]
    note: str = ""

    def __str__(self) -> str:
        old, new = self.momentum
        change = "" if old == new else f", momentum {old} -> {new}"
        return f"{self.name or '(root)'}: {self.before} -> {self.after}{change}{self.note and ', ' + self.note}"


@dataclass(frozen=True)
class PassedOver:
    """A norm layer that was left as it is.

    Args:
        name: its name in the model.
        kind: its class.
        reason: why.
    """

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(root)'}: {self.kind} left as it is, {self.reason}"


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did; print it.

    Args:
        replaced: layers replaced, in the order of the model.
        passed_over: norm layers left alone that a user may have expected to change.
        fused: calls of norm layers that take in what follows, with `fuse=True`.
        not_fused: calls of norm layers that do not, with `fuse=True`.
    """

    replaced: tuple[Replacement, ...]
    passed_over: tuple[PassedOver, ...]
    fused: tuple[Fused, ...] = ()
    not_fused: tuple[NotFused, ...] = ()

    def __str__(self) -> str:
        counts = f"{len(self.replaced)} layers replaced, {len(self.passed_over)} passed over"
        if self.fused or self.not_fused:
            counts += f", {len(self.fused)} calls fused, {len(self.not_fused)} not"
        rows = (*self.replaced, *self.passed_over, *self.fused, *self.not_fused)
        return "\n  ".join([counts, *map(str, rows)])
