"""The activations that a layer can apply to its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

Activation = Literal["relu", "leaky_relu", "silu", "gelu"]

# All of them map 0 to 0, so that masked outputs stay 0.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
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
