"""What `convert` may pass on to the layers it makes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from ..limits import Limits
from ..norm import Norm

_FROM_REPLACED = ("num_features", "affine", "bias", "track_running_stats", "device", "dtype")
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_OWN = ("where", "steps", "policies", "frozen", "fuse", "report")


def check_options(to: type[Norm], options: dict[str, Any]) -> None:
    """Refuse options that no layer of the target takes.

    Args:
        to: target of the conversion.
        options: as they were given.

    Raises:
        TypeError: there is no such option.
        ValueError: the replaced layer says what it is.
    """
    for option, value in options.items():
        if option in _FROM_REPLACED:
            raise ValueError(f"{option} comes from the replaced layer and cannot be given, got {value!r}")
    known = [name for name in _parameters(to) if name not in _FROM_REPLACED]
    for option in options:
        if option not in known:
            meant = _meant(option, [*known, *_OWN])
            hint = f" (did you mean {meant}?)" if meant else ""
            raise TypeError(f"{to.__name__} has no option {option!r}{hint}; it has {', '.join(known)}")


def _meant(option: str, known: Sequence[str]) -> str | None:
    if option == "total_steps":
        return "limits=renorm.Limits.over(total_steps)"
    of_limits = get_close_matches(option, [field.name for field in fields(Limits)], 1)
    if of_limits:
        return f"limits=renorm.Limits({of_limits[0]}=...)"
    return next(iter(get_close_matches(option, known, 1)), None)


def require_options(target: type[Norm], given: Iterable[str]) -> None:
    """Refuse to make a layer that lacks something it cannot do without.

    Args:
        target: class of the layer.
        given: names of the options, from the user and from the layer to be replaced.

    Raises:
        TypeError: one is missing.
    """
    missing = [
        name
        for name, parameter in _parameters(target).items()
        if parameter.default is parameter.empty and name not in given
    ]
    if missing:
        raise TypeError(f"{target.__name__} needs {missing[0]}: give convert(model, ..., {missing[0]}=...)")


def _parameters(target: type[Norm]) -> dict[str, inspect.Parameter]:
    """Those of the constructor, and of the one above it where it passes others on."""
    found: dict[str, inspect.Parameter] = {}
    for kind in target.__mro__:
        if "__init__" in vars(kind):
            own = inspect.signature(vars(kind)["__init__"]).parameters
            found = {name: p for name, p in own.items() if name != "self" and p.kind not in _REST} | found
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values()):
                break
    return found
