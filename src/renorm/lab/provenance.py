"""What a folder of results says of its origin: options, command, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from . import ranks
from .errors import LabError
from .recipe import Recipe
from .store import replace_text

# Options that change results by rounding at most.
_INDIFFERENT = ("out", "workers", "checkpoint_every", "logger", "save_weights")
_PACKAGES = ("renorm", "torch", "torchvision", "timm", "lightning", "numpy", "scikit-learn")


def open_folder(recipe: Recipe, command: str) -> None:
    """Create the output folder, or make sure that it was made by the same recipe with the same options.

    Writes config.yaml, which `renorm run RECIPE --config` takes, command.txt and provenance.json.

    Args:
        recipe: the recipe with its options.
        command: the command line.

    Raises:
        LabError: the folder cannot be used, or belongs to other options.
    """
    folder = recipe.folder
    options = _plain(asdict(recipe))
    origin = {"recipe": recipe.name, "command": command, "seeds": list(range(recipe.seeds)), **_surroundings(recipe)}
    title = f"# renorm run {recipe.name} --config config.yaml\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_same(_read_options(folder), {"recipe": recipe.name} | options, recipe)
        replace_text(folder / "config.yaml", title + yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
        replace_text(folder / "command.txt", command + "\n")
        replace_text(folder / "provenance.json", json.dumps(origin, indent=2) + "\n")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LabError(f"{folder}: cannot be used for results: {' '.join(str(error).split())}") from None


def _read_options(folder: Path) -> dict[str, Any]:
    """Recipe and options of the folder's results; nothing for a new folder."""
    if (folder / "config.yaml").exists() and (folder / "provenance.json").exists():
        origin = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return {"recipe": origin["recipe"], **options}
    if (folder / "settings.json").exists():  # of renorm 0.1
        before: dict[str, Any] = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        return before
    return {}


def _check_same(before: Mapping[str, object], now: Mapping[str, object], recipe: Recipe) -> None:
    defaults = {field.name: _plain(field.default) for field in fields(recipe) if field.default is not MISSING}
    for name, value in now.items():
        held = before.get(name, defaults.get(name)) if before else value  # an option that came later had its default
        if held != value and name not in _INDIFFERENT:
            raise LabError(
                f"{recipe.folder}: holds results with {name} = {held}, not {value}; "
                f"choose another --out, or delete the folder"
            )


def _plain(value: Any) -> Any:
    """As YAML has it: lists for tuples, texts for paths, plain numbers for those that check their range."""
    return json.loads(json.dumps(value, default=str))


def _surroundings(recipe: Recipe) -> dict[str, object]:
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "git": _commit(),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "device": recipe.device},
        "processes": ranks.number(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the repository that this code lies in, with a plus sign if files differ from it."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+")
    except (OSError, subprocess.SubprocessError):
        return None  # an installed package, or no git


def _git(*arguments: str) -> str:
    command, here = ["git", *arguments], Path(__file__).parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
