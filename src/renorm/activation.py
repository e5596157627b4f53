"""The activations that a layer can apply to its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish"]

# All of them map 0 to 0, so that masked outputs stay 0.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}


def require_activation(act: str | None) -> None:
    """Refuse an activation that does not exist.

    Args:
        act: name of the activation, or None.

    Raises:
        ValueError: it is unknown.
    """
    if act is not None and act not in _FUNCTIONS:
        raise ValueError(f"act must be None or one of {', '.join(map(repr, get_args(Activation)))}, got {act!r}")


def activate(x: Tensor, act: Activation | None) -> Tensor:
    """Apply an activation by name.

    Args:
        x: any shape.
        act: name of the activation, with PyTorch's default settings; None for none.

    Returns:
        The activated tensor.
    """
    return x if act is None else _FUNCTIONS[act](x)


def is_piecewise_linear(act: str) -> bool:
    """Whether an activation's derivative can be told from its output.

    Args:
        act: name of the activation.

    Returns:
        True for the relu family.
    """
    return act in ("relu", "relu6", "leaky_relu")


def derivative_from_output(y: Tensor, act: str) -> Tensor:
    """The derivative of a piecewise linear activation where it had the output y.

    Args:
        y: what came out of the activation, any shape.
        act: one that `is_piecewise_linear`.

    Returns:
        The derivative, a constant for autograd, shape of y.
    """
    y = y.detach()
    if act == "leaky_relu":
        return torch.where(y > 0, 1.0, 0.01).to(y.dtype)
    inside = y > 0 if act == "relu" else (y > 0) & (y < 6)
    return inside.to(y.dtype)
