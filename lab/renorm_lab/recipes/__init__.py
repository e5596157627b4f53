"""The recipes: each file here is an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from ..recipe import Recipe


def _found() -> Iterator[type[Recipe]]:
    for file in iter_modules(__path__, f"{__name__}."):
        for value in vars(import_module(file.name)).values():
            # In this order, since to Python 3.10 list[int] is a type, but no class.
            if isinstance(value, type) and value.__module__ == file.name and issubclass(value, Recipe):
                yield value


RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in _found()}
