"""What a folder of results says of its origin: options, command, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ..errors import LabError
from ..recipe import Recipe
from ..store import read_settings, save_text

_INDIFFERENT = ("out", "data_root", "workers", "checkpoint_every", "logger", "save_weights")  # results are the same
_PACKAGES = ("renorm", "torch", "torchvision", "timm", "lightning", "numpy", "scikit-learn")


def check_folder(recipe: Recipe) -> None:
    """Make sure that the output folder, if there is one, was made by the same recipe with the same options.

    Args:
        recipe: the recipe with its options.

    Raises:
        LabError: the folder belongs to other options, or a file in it is damaged.
    """
    _check_same(_read_options(recipe.folder), {"recipe": recipe.name} | _options(recipe), recipe)


def write_origin(recipe: Recipe, command: str, processes: int) -> None:
    """Say in the output folder where the results come from that will be trained now.

    The first time config.yaml, which `renorm run RECIPE --config` takes, command.txt and provenance.json; later an
    entry in the list "continued" of the last.

    Args:
        recipe: the recipe with its options.
        command: the command line.
        processes: number of ranks that train together.

    Raises:
        LabError: a file cannot be written.
    """
    folder = recipe.folder
    origin = read_settings(folder / "provenance.json")
    programs = {"command": command, "versions": _versions(), "git": _commit()}
    if origin:
        continued = origin.get("continued", [])
        if not isinstance(continued, list):
            raise LabError(f"{folder / 'provenance.json'}: damaged: its continued must be a list, got {continued}")
        origin["continued"] = [*continued, programs]
    else:
        machine = {"system": platform.platform(), "cores": os.cpu_count(), "device": recipe.device}
        origin = {"recipe": recipe.name, "seeds": list(recipe.seed_numbers), **programs}
        origin |= {"machine": machine, "processes": processes}
    options = yaml.safe_dump(_options(recipe), sort_keys=False, allow_unicode=True)
    _write_once(folder / "config.yaml", f"# renorm run {recipe.name} --config config.yaml\n{options}")
    _write_once(folder / "command.txt", command + "\n")
    save_text(folder / "provenance.json", json.dumps(origin, indent=2) + "\n")


def _write_once(path: Path, text: str) -> None:
    if not path.is_file():
        save_text(path, text)


def _options(recipe: Recipe) -> dict[str, Any]:
    options: dict[str, Any] = _as_yaml(asdict(recipe))
    return options


def _read_options(folder: Path) -> dict[str, Any]:
    """Recipe and options of the folder's results; nothing for a new folder."""
    origin, options = (read_settings(folder / name) for name in ("provenance.json", "config.yaml"))
    if not (origin and options):
        return read_settings(folder / "settings.json")  # of renorm 0.1
    if not isinstance(origin.get("recipe"), str):
        raise LabError(f"{folder / 'provenance.json'}: damaged: it does not name the recipe")
    return {"recipe": origin["recipe"], **options}


def _check_same(before: Mapping[str, object], now: Mapping[str, object], recipe: Recipe) -> None:
    defaults = {field.name: _as_yaml(_default(field)) for field in fields(recipe)}
    for name, value in now.items():
        held = before.get(name, defaults.get(name)) if before else value  # an option that came later had its default
        if held != value and name not in _INDIFFERENT:
            raise LabError(
                f"{recipe.folder}: holds results with {name} = {held}, not {value}; "
                f"choose another --out, or delete the folder"
            )


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _as_yaml(value: Any) -> Any:
    """As YAML has it: lists for tuples, texts for paths, plain numbers for those that check their range."""
    return json.loads(json.dumps(value, default=str))


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


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
