"""The recipes: one file for each experiment."""

from __future__ import annotations

from ..recipe import Recipe
from .microbatch import Microbatch
from .noniid import NonIid

RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in (NonIid, Microbatch)}
