"""Run folders as they lie on the disk, of this version or an older one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import LabError
from ..recipes import RECIPES
from ..results import Results, read_results
from ..runs import Run
from ..store import read_settings
from ..summary import Summary, summarize

_SETTINGS = ("settings.json", "config.yaml", "provenance.json")  # the first is of renorm 0.1


@dataclass(frozen=True)
class Folder:
    """What `renorm run` wrote.

    Args:
        path: where it lies.
        settings: options of the recipe, and where its results come from.
        command: the command line, if it is known.
        versions: of the programs, and whatever else results.csv says apart from runs and results.
        results: result of each finished run, in the order of the table.
    """

    path: Path
    settings: Mapping[str, object]
    command: str
    versions: Mapping[str, str]
    results: Results

    @property
    def name(self) -> str:
        """Its own name, without those above it."""
        return self.path.resolve().name

    @property
    def first(self) -> Run:
        """The run whose recipe, data and model are everybody's."""
        return next(iter(self.results))

    @property
    def summary(self) -> Summary:
        """The table, as its recipe shows it."""
        recipe = RECIPES.get(self.first.recipe)
        if recipe is None:
            return summarize(self.results)
        return summarize(self.results, recipe.score, shows_training=recipe.shows_training)


def read_folder(path: Path) -> Folder:
    """Read a run folder.

    Args:
        path: the folder.

    Returns:
        Its content.

    Raises:
        LabError: there is no such folder, it is none of `renorm run`, or a file in it is damaged.
    """
    if not path.is_dir():
        raise LabError(f"{path}: there is no such folder")
    if not (path / "results.csv").is_file():
        raise LabError(f"{path}: holds no results.csv; folders are those that `renorm run` wrote")
    results = read_results(path)
    if not results:
        raise LabError(f"{path}/results.csv: no run is finished")
    settings: dict[str, object] = {}
    for name in _SETTINGS:
        settings |= read_settings(path / name)
    return Folder(path, settings, _command(path / "command.txt"), _versions(results), results)


def _command(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    except (OSError, ValueError) as error:
        raise LabError(f"{path}: cannot be read: {error}") from None


def _versions(results: Results) -> dict[str, str]:
    pairs = [pair for result in results.values() for pair in result.versions]
    names = dict.fromkeys(name for name, _ in pairs)
    return {name: ", ".join(dict.fromkeys(text for other, text in pairs if other == name)) for name in names}
