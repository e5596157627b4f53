"""Tracing one module's own forward, its children being calls, such that the graph does what the forward does."""

from __future__ import annotations

import enum
import functools
import inspect
import operator
import types
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .watch import watched

_MODULE_STATE = frozenset(vars(nn.Module()))
_PLAIN = (
    bool, int, float, complex, str, bytes, type, types.NoneType, types.FunctionType, types.BuiltinFunctionType,
    functools.partial, enum.Enum, torch.dtype, torch.device, torch.memory_format,
)  # fmt: skip
_CONTAINERS = (tuple, list, dict, torch.Size, fx.immutable_collections.immutable_list)
_INPLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")


class UntraceableError(Exception):
    """Why a forward has no graph that would stand in for it."""


@dataclass(frozen=True)
class Trace:
    """A module's forward in one mode.

    Args:
        graph: its graph; children are called as modules.
        settings: attributes that the forward read, with the values that the graph is for.
    """

    graph: fx.Graph
    settings: tuple[tuple[str, object], ...]


def trace(owner: nn.Module, cls: type[nn.Module], training: bool) -> Trace:
    """Trace a module's forward, the module itself staying untouched.

    Args:
        owner: module to trace.
        cls: class whose forward is traced.
        training: mode to trace in.

    Returns:
        The trace. Arguments with defaults are at their defaults, and no inputs of the graph.

    Raises:
        UntraceableError: torch.fx cannot trace the forward, or would not see all that it does.
    """
    _check_signature(cls)
    settings: dict[str, object] = {}
    try:
        graph, unseen = watched_trace(_OwnForward(), _stand_in(owner, cls, training, settings))
    except Exception as error:  # a forward that runs on stand-ins for tensors may fail in any way
        raise UntraceableError(f"torch.fx cannot trace {cls.__name__}: {first_line(error)}") from error
    if unseen:
        raise UntraceableError(f"torch.fx does not see all that {cls.__name__} does ({unseen[0]})")
    return Trace(graph, tuple(settings.items()))


def watched_trace(tracer: Tracer, stand_in: nn.Module) -> tuple[fx.Graph, list[str]]:
    """Trace a stand-in for a module, and watch what the graph does not show; errors of the forward come out.

    Args:
        tracer: what traces.
        stand_in: module to trace.

    Returns:
        The graph, and the names of what it does not show.
    """
    with warnings.catch_warnings(), watched(stand_in) as unseen:
        warnings.simplefilter("ignore")  # the forward's own will come when it runs
        graph = tracer.trace(stand_in)
    return graph, unseen


def first_line(error: Exception) -> str:
    """What an error says, in short.

    Args:
        error: any error.

    Returns:
        The first line of its message; its class, if it has none.
    """
    return (str(error) or type(error).__name__).strip().splitlines()[0]


class Tracer(fx.Tracer):
    """Takes optional inputs at their defaults, and buffers as values that may change."""

    proxy_buffer_attributes = True  # or changing a buffer would happen while tracing, and never again

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> Any:
        """See `torch.fx.Tracer`; a placeholder with a default is the default."""
        if kind == "placeholder" and args:
            return args[0]
        return super().create_proxy(kind, target, args, kwargs, *more, **options)


def _check_signature(cls: type[nn.Module]) -> None:
    for parameter in inspect.signature(cls.forward).parameters.values():
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD or isinstance(parameter.default, _CONTAINERS):
            raise UntraceableError(f"{cls.__name__}.forward takes {parameter}")


def _stand_in(owner: nn.Module, cls: type[nn.Module], training: bool, settings: dict[str, object]) -> nn.Module:
    """A module with the owner's state that notes the settings it reads and refuses to be changed."""

    class StandIn(cls):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name.startswith("__") or name in _MODULE_STATE or hasattr(nn.Module, name):
                return value
            if _is_plain(value):
                settings[name] = value
            elif name in super().__getattribute__("__dict__"):
                raise UntraceableError(f"it reads {name}, which may change unnoticed")
            return value

        def __setattr__(self, name: str, value: object) -> None:
            raise UntraceableError(f"it needs the attribute {name} set")

    stand_in: nn.Module = object.__new__(StandIn)
    vars(stand_in).update(vars(owner), training=training)
    return stand_in


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


class _Recorded(fx.Proxy):
    """A proxy that records `x += y` as what it is; torch.fx would take it for `x = x + y`."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _RecordedAttribute(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise UntraceableError(f"it sets {name} of a tensor")
        super().__setattr__(name, value)


class _RecordedAttribute(_Recorded, fx.proxy.Attribute):
    pass


def _record_in_place(function: Any) -> Any:
    def method(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in _INPLACE:
    setattr(_Recorded, f"__i{_name}__", _record_in_place(getattr(operator, f"__i{_name}__")))


class _OwnForward(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Recorded(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, (tuple, list, dict)) and type(a) not in _CONTAINERS and not hasattr(a, "_fields"):
            raise UntraceableError(f"it makes a {type(a).__name__}, which becomes another type in a graph")
        return super().create_arg(a)
