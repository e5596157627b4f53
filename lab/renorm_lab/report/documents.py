"""Tables between markers in a Markdown page, from committed results: `python -m renorm_lab.report.documents PAGE`.

A page's `<!-- table FOLDER -->` ... `<!-- end -->` holds the table of that folder, its `<!-- losses FOLDER -->` what
each method loses to the best, its `<!-- measures FOLDER -->` the shares that were measured besides, in percent,
`<!-- measures FOLDER: REGIME -->` those in one regime, its `<!-- claims FOLDER... -->` the papers' claims with what the
folders say about them.
Folders lie in `results/` beside the page's own folder.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ..errors import LabError
from ..store import save_text
from ..summary import markdown_lines
from .compare import compare
from .folders import read_folder
from .losses import loss_table
from .tables import TextTable, claim_table, share_table

_BLOCK = re.compile(
    r"(?P<start><!-- (?P<kind>table|losses|measures|claims) (?P<names>[^>]+?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def renewed(page: str, results: Path) -> str:
    """A page with its tables written anew.

    Args:
        page: Markdown with markers.
        results: folder of the run folders.

    Returns:
        The page; what stands outside of markers is as it was.

    Raises:
        LabError: a folder cannot be read.
    """
    return _BLOCK.sub(lambda block: f"{block['start']}{_table(block, results)}{block['end']}", page)


def _table(block: re.Match[str], results: Path) -> str:
    if block["kind"] == "claims":
        folders = [read_folder(results / name) for name in block["names"].split()]
        claims = claim_table([comparison for folder in folders for comparison in compare(folder)])
        return markdown_lines(claims.header, claims.rows, numbers=False)
    name, _, regime = block["names"].partition(": ")
    folder = read_folder(results / name)
    if block["kind"] == "measures":
        table = share_table(folder.results, regime)
    elif block["kind"] == "losses":
        table = loss_table(folder.summary)
    else:
        table = TextTable(folder.summary.header, folder.summary.rows)
    return markdown_lines(table.header, table.rows)


def main(arguments: list[str]) -> int:
    """Renew the tables of pages.

    Args:
        arguments: paths of the pages.

    Returns:
        The exit status.
    """
    for path in map(Path, arguments):
        try:
            text = path.read_text(encoding="utf-8")
            save_text(path, renewed(text, path.resolve().parent.parent / "results"))
        except (LabError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
