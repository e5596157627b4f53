"""What is recommended: the line to copy, the reason, how sure it is, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from textwrap import fill
from typing import Any

from torch import nn

from ..conversion.convert import convert
from ..limits import Limits
from ..markup import bullets
from ..norm import Norm

_WIDTH = 76  # of printed lines


@dataclass(frozen=True)
class Evidence:
    """Figures that were measured.

    Args:
        file: CSV file in the repository.
        setting: which of its rows, as the file names it.
        data: what was trained on.
        group_size: examples that share statistics.
        steps: of the training.
        figures: mean over the seeds by method, the recommended one first.
        unit: of the figures.
        certain: whether the first method is ahead of batch norm beyond what the seeds leave open, at 95%.
    """

    file: str
    setting: str
    data: str
    group_size: int
    steps: int
    figures: dict[str, float]
    unit: str = "%"
    certain: bool = True

    def __str__(self) -> str:
        figures = "; ".join(f"{method}: {figure:.1f}{self.unit}" for method, figure in self.figures.items())
        where = f"- {self.data}, {self.setting}, {self.steps:,} steps ({self.file}):"
        return (
            f"{_filled(where, subsequent_indent='  ')}\n{_filled(figures, initial_indent='  ', subsequent_indent='  ')}"
        )


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` returns; prints as code and reasons.

    Args:
        layer: what to convert batch norm layers to; None to leave them as they are.
        options: of `renorm.convert`.
        weigh: whether to choose the example weight with `renorm.weigh` once the model is trained.
        why: the reason.
        sure: how sure it is.
        evidence: measurements behind it, the nearest to what was asked first.
        total_steps: of the training.
        frozen_share: share of the training, at its end, in which layers normalize by their running statistics.
        costs: what it costs.
        otherwise: what would be recommended beyond a boundary that lies near.
    """

    layer: type[Norm] | None
    options: dict[str, Any]
    weigh: bool
    why: str
    sure: str
    evidence: tuple[Evidence, ...]
    total_steps: int
    frozen_share: float = 0.0
    costs: tuple[str, ...] = ()
    otherwise: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert a model's batch norm layers, in place, as `renorm.convert` does; `code` has what else is to be done.

        Args:
            model: not yet wrapped in DDP or FSDP nor compiled.

        Returns:
            The model.
        """
        return model if self.layer is None else convert(model, self.layer, **self.options)

    @property
    def code(self) -> str:
        """The lines to copy."""
        lines = [self._conversion()]
        if self.frozen_share:
            at = round(self.total_steps * (1 - self.frozen_share))
            lines.append(f"freeze = renorm.LateFreeze(model, at={at})")
            lines.append("freeze.step()  # after every step of the training")
        if self.weigh:
            lines.append("renorm.weigh(model, validation)  # once it is trained")
        return "\n".join(lines)

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        if self.layer is None:
            return "nn.BatchNorm" + ", weighed" * self.weigh
        limits = self.options.get("limits")
        within = ""
        if limits is not None:
            within = (
                " without limits" if limits.r_max == math.inf else f", r to {limits.r_max:g}, d to {limits.d_max:g}"
            )
        words = [
            self.layer.__name__ + within,
            "synchronized" * ("sync" in self.options),
            "frozen at the end" * bool(self.frozen_share),
            "weighed" * self.weigh,
        ]
        return ", ".join(filter(None, words))

    def __str__(self) -> str:
        return "\n".join([self.code, *(_filled(text) for text in self._words()), *map(str, self.evidence)])

    def _repr_html_(self) -> str:
        words = "".join(f"<p>{escape(text)}</p>" for text in self._words())
        evidence = bullets(" ".join(str(found).removeprefix("- ").split()) for found in self.evidence)
        return f"<pre>{escape(self.code)}</pre>{words}{evidence}"

    def _words(self) -> list[str]:
        return [self.why, self.sure, *self.costs, *self.otherwise]

    def _conversion(self) -> str:
        if self.layer is None:
            return "keep nn.BatchNorm"
        options = "".join(f"\n    {name}={_code(value, self.total_steps)}," for name, value in self.options.items())
        return f"model = renorm.convert(\n    model, renorm.{self.layer.__name__},{options}\n)"


def _filled(text: str, **indents: str) -> str:
    return fill(text, _WIDTH, break_on_hyphens=False, **indents)  # type: ignore[arg-type]  # no names of files in two


def _code(value: object, total_steps: int) -> str:
    if not isinstance(value, Limits):
        return repr(value)
    ends = "" if (value.r_max, value.d_max) == (3.0, 5.0) else f"{_number(value.r_max)}, {_number(value.d_max)}"
    if value.r_end == 0:
        return f"renorm.Limits.constant({ends})"
    return f"renorm.Limits.over({total_steps}{', ' * bool(ends)}{ends})"


def _number(value: float) -> str:
    return 'float("inf")' if value == math.inf else f"{value:g}"
