"""The report: an HTML page that needs nothing else, and the same in Markdown."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from renorm.markup import printable

from ..errors import LabError
from ..recipes import RECIPES
from ..store import save_text
from ..summary import markdown_lines, markdown_text
from ..terminal import console
from .claims import CLAIMS
from .compare import LEVEL, Beside, beside, compare
from .folders import Folder, read_folder
from .losses import loss_table
from .pictures import Picture, pictures
from .tables import NEAR, TextTable, beside_table, claim_table, comparison_table, disagreements, measure_table, tally


@dataclass(frozen=True)
class Section:
    """What the report says about one folder.

    Args:
        name: of the folder.
        title: what was done on what.
        paper: what the paper found, in a line.
        command: the command line.
        settings: options and versions, as text.
        table: means and standard deviations.
        caption: what the numbers of the table are.
        losses: what each method loses to the best of a column; no rows where there is nothing to compare.
        measures: what else was measured; no rows where nothing was.
        beside: the papers' numbers beside ours; no rows where there are none.
        elsewhere: how the setting differs from each paper's.
        pictures: bars and curves.
        files: pictures of the folder itself, by what they show, seen from the report.
    """

    name: str
    title: str
    paper: str
    command: str
    settings: Mapping[str, str]
    table: TextTable
    caption: str
    losses: TextTable
    measures: TextTable
    beside: TextTable
    elsewhere: list[str]
    pictures: list[Picture]
    files: Mapping[str, str]


def report(folders: list[Path], out: Path = Path("runs/report")) -> None:
    """Compare run folders with the papers' claims, as a page for the browser and as Markdown.

    Tables hold means and standard deviations over seeds, the paper's numbers stand beside ours, and each claim is
    confirmed or not by a rule that the page states.

    Args:
        folders: what `renorm run` wrote.
        out: folder for report.html and report.md.

    Raises:
        LabError: a folder is none of `renorm run`, or damaged, or `out` cannot be written.
    """
    read = [read_folder(path) for path in folders]
    repeated = [name for name, count in Counter(folder.name for folder in read).items() if count > 1]
    if repeated:
        raise LabError(f"folders must have different names, got {repeated[0]} twice")
    comparisons = [comparison for folder in read for comparison in compare(folder)]
    settings: dict[str, set[str]] = {}
    for claim in CLAIMS:
        settings.setdefault(claim.setting.name, set()).add(claim.source)
    content = {
        "sections": [_section(folder, out) for folder in read],
        "runs": sum(len(folder.results) for folder in read),
        "tally": tally(comparisons),
        "claims": claim_table(comparisons),
        "comparisons": comparison_table(comparisons),
        "disagreements": disagreements(comparisons, [pair for folder in read for pair in beside(folder)]),
        "settings": [f"{', '.join(sorted(sources))}: {setting}" for setting, sources in settings.items()],
        "level": f"{LEVEL:g}",
        "near": f"{NEAR:g}",
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("report.html", "report.md"):
            save_text(out / name, _environment().get_template(name).render(content))
    except OSError as error:
        raise LabError(f"{out}: cannot be written: {error}") from None
    place = printable(str(out / "report.html"))
    console().print(f"{content['tally']}\nThe report is in {place}, and as report.md beside it.")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("renorm_lab.report", "."),
        autoescape=lambda name: bool(name) and str(name).endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = lambda table, numbers=True: markdown_lines(
        table.header, table.rows, numbers=numbers
    )
    environment.filters["plain"] = markdown_text
    return environment


def _section(folder: Folder, out: Path) -> Section:
    run = folder.first
    recipe = RECIPES.get(run.recipe)
    summary = folder.summary
    pairs = beside(folder)
    return Section(
        name=folder.name,
        title=f"{recipe.title if recipe else run.recipe}: {run.model} on {run.data}",
        paper=f"{recipe.source}: {recipe.claim}." if recipe else "",
        command=folder.command,
        settings={name: str(value) for name, value in {**folder.settings, **folder.versions}.items()},
        table=TextTable(summary.header, summary.rows),
        caption=summary.caption,
        losses=loss_table(summary),
        measures=measure_table(folder.results),
        beside=beside_table(pairs),
        elsewhere=_elsewhere(pairs),
        pictures=pictures(folder.results, summary),
        files={
            what: Path(os.path.relpath(folder.path / name, out)).as_posix()
            for what, name in (("Bars of the table's accuracies", "bars.png"), ("Curves of the training", "curves.png"))
            if (folder.path / name).is_file()
        },
    )


def _elsewhere(pairs: list[Beside]) -> list[str]:
    """How the setting differs from each source's, once for all rows."""
    differences: dict[str, dict[str, None]] = {}
    for pair in pairs:
        differences.setdefault(pair.numbers.source, {}).update(dict.fromkeys(pair.elsewhere))
    return [f"{source}: {'; '.join(phrases)}" for source, phrases in differences.items() if phrases]
