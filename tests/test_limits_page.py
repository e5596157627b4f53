"""The comparison of limits in docs/limits.md, against the committed results."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

import pytest

_ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (_ROOT / "results").exists(), reason="an sdist holds no results")


def _folder(size: int) -> str:
    return "allfour-cifar100" if size in (128, 16, 4) else "combination-cifar100"


_ROWS = {
    **{f"{size} independent": (_folder(size), f"batch size {size}") for size in (128, 64, 16, 8, 4, 2)},
    "16 classes x 4": ("combination-cifar100", "16 classes x 4"),
    "Omniglot, 32 classes x 2": ("metric-omniglot*", "32 classes x 2"),
    "Omniglot, 8 classes x 8": ("metric-omniglot*", "8 classes x 8"),
}
_CLOSER = "batch renorm, r to 1.5, d to 0.5"
_COLUMNS = (("batch norm", "off"), ("batch norm", "on"), ("batch renorm", "off"), (_CLOSER, "off"), (_CLOSER, "on"))


def _accuracy(folder: str, regime: str, method: str, switch: str) -> str:
    texts = [path.read_text() for path in (_ROOT / "results").glob(f"{folder}/results.csv")]
    rows = [row for text in texts for row in csv.DictReader(text.splitlines())]
    chosen = [row for row in rows if (row["regime"], row["method"]) == (regime, method)]
    assert len(chosen) == 3, (folder, regime, method)
    return f"{100 * mean(float(row[f'test_accuracy_{switch}']) for row in chosen):.1f}"


def test_the_table_of_closer_limits_is_that_of_the_results():
    page = (_ROOT / "docs/limits.md").read_text()
    section = page[page.index("### Closer") : page.index("Steps are the layer's own")]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    table = {line[0]: line[1:] for line in lines[2:]}
    assert list(table) == list(_ROWS)
    for name, place in _ROWS.items():
        assert table[name] == [_accuracy(*place, *column) for column in _COLUMNS], name
