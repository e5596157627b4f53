"""The call that stands in a rewritten forward for a norm layer, the residual add and the activation."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from ..activation import Activation, activate


def call_norm(
    norm: nn.Module, x: Tensor, residual: Any = None, in_place: bool = False, act: Activation | None = None
) -> Tensor:
    """Normalize, add and activate in one go.

    Args:
        norm: norm layer.
        x: its input.
        residual: what is added to the normalized output; None for nothing.
        in_place: whether the model adds in place, which matters for a residual of another shape or dtype.
        act: activation applied last, if any.

    Returns:
        What the calls return one after the other.
    """
    if residual is None or (isinstance(residual, Tensor) and _is_alike(residual, x)):
        y: Tensor = norm(x, residual=residual, act=act)
        return y
    add = operator.iadd if in_place else operator.add  # broadcasts and promotes, as layers do not
    return activate(add(norm(x), residual), act)


def _is_alike(residual: Tensor, x: Tensor) -> bool:
    return residual.shape == x.shape and residual.dtype == x.dtype
