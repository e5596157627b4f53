"""What the library calls certain, by the lab's own rule."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from renorm.recommendation import Evidence, decide
from renorm_lab.report.intervals import difference

_ROOT = Path(__file__).parents[2]
_EVIDENCE = {
    name: value
    for name, value in vars(decide).items()
    if isinstance(value, Evidence) and value.file.startswith("results/")
}
pytestmark = pytest.mark.skipif(not (_ROOT / "results").exists(), reason="an sdist holds no results")


def _accuracies(evidence: Evidence, setting: str, method: str) -> list[float]:
    with (_ROOT / evidence.file).open() as file:
        rows = [row for row in csv.DictReader(file) if (row["regime"], row["method"]) == (setting, method)]
    return [float(row["test_accuracy_off"]) for row in rows]


@pytest.mark.parametrize("name", _EVIDENCE)
def test_ahead_for_certain_is_what_the_seeds_do_not_leave_open(name: str):
    evidence, setting = _EVIDENCE[name], _EVIDENCE[name].setting
    method = next(iter(evidence.figures))
    if method == "batch norm, synchronized":  # a column of its own
        method, setting = "batch norm", "synchronized"
    first = _accuracies(evidence, setting, method)
    found = difference(first, _accuracies(evidence, evidence.setting, "batch norm"), paired=False)
    assert evidence.certain == (found.low > 0)
