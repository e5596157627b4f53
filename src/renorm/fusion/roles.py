"""What a module or a call does beside a norm layer: an activation that layers have, nothing at all, or the norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..activation import Activation
from ..norm import Norm

NORM, IDENTITY = "norm", "identity"
_NAMES: tuple[Activation, ...] = get_args(Activation)
_CLASSES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}
_IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul", "setitem"}
)
# The settings with which an activation is the one that layers have, in the order of its positional arguments.
_SETTINGS: dict[str, dict[str, object]] = {"leaky_relu": {"negative_slope": 0.01}, "gelu": {"approximate": "none"}}


def _forms(*places: object) -> dict[Callable[..., Any], Activation]:
    forms = ((getattr(place, name + suffix, None), name) for name in _NAMES for suffix in ("", "_") for place in places)
    return {function: name for function, name in forms if function is not None}


_FUNCTIONS = _forms(F, torch)
_METHODS: dict[str, Activation] = {function.__name__: name for function, name in _forms(Tensor).items()}


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches a module being called.

    Args:
        module: any module.

    Returns:
        True if there is a forward or backward hook on it.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def module_activation(module: nn.Module) -> Activation | None:
    """The activation that a module is, as long as nobody watches it.

    Args:
        module: any module.

    Returns:
        Its name, if it is one that layers have, with the same settings.
    """
    name = _CLASSES.get(type(module))
    if name not in _NAMES or hooked(module):
        return None
    same = all(getattr(module, setting) == value for setting, value in _SETTINGS.get(name, {}).items())
    return name if same else None


def call_activation(node: fx.Node) -> Activation | None:
    """The activation that a traced call of a function or method is.

    Args:
        node: call in a graph.

    Returns:
        Its name, if it is one that layers have, with the same settings; the input is the first argument.
    """
    target: Any = node.target
    name = _METHODS.get(target) if node.op == "call_method" else _FUNCTIONS.get(target)
    if name is None:
        return None
    expected = _SETTINGS.get(name, {})
    given = dict(zip((*expected, "inplace"), node.args[1:], strict=False)) | node.kwargs
    given.pop("inplace", None)
    same = all(setting in expected and value == expected[setting] for setting, value in given.items())
    return name if same else None


def written(node: fx.Node, owner: nn.Module) -> Any:
    """What a call writes to in place.

    Args:
        node: call in a graph.
        owner: module whose forward it is in.

    Returns:
        The node whose memory it changes; None if there is none.
    """
    first = node.args[0] if node.args else None
    if node.op == "call_module":
        inside = owner.get_submodule(str(node.target)).modules()
        return first if any(getattr(module, "inplace", False) for module in inside) else None
    if node.op not in ("call_function", "call_method"):
        return None
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))
    is_operator = getattr(node.target, "__module__", None) == "_operator" and name in _IN_PLACE_OPERATORS
    if is_operator or (name.endswith("_") and not name.endswith("__")):
        return first
    if node.kwargs.get("inplace") or any(arg is True for arg in node.args[1:]):  # 1.0 == True
        return first
    return node.kwargs.get("out")


def role(module: nn.Module) -> str | None:
    """What a module does beside a norm layer, as long as nobody watches it.

    Args:
        module: any module.

    Returns:
        NORM for a layer of ours that only normalizes, IDENTITY, an activation's name, or None.
    """
    if type(module) is nn.Identity:
        return None if hooked(module) else IDENTITY
    if isinstance(module, Norm):
        return NORM if is_bare(module) and not hooked(module) else None
    return module_activation(module)


def is_bare(layer: Norm) -> bool:
    """Whether a layer only normalizes.

    Args:
        layer: layer of ours.

    Returns:
        True without activation, drop and a forward of its own.
    """
    return type(layer).forward is Norm.forward and _is_nothing(layer.act) and _is_nothing(layer._modules.get("drop"))


def _is_nothing(inside: object) -> bool:
    return inside is None or type(inside) is nn.Identity
