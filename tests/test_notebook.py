"""The notebook runs from beginning to end, and repairs what it breaks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "repair.ipynb"


def _printed(notebook: nbformat.NotebookNode) -> str:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(output.text for output in outputs if output.output_type == "stream")


def _accuracy(norm: str, printed: str) -> float:
    """In %, on test data, of the network that was trained with batches of 2."""
    found = re.search(rf"^batches of 2, {norm} +test accuracy +([\d.]+)%$", printed, re.MULTILINE)
    assert found
    return float(found[1])


def _check_repair(printed: str) -> None:
    broken, repaired, grouped = (
        _accuracy(norm, printed) for norm in ("nn.BatchNorm1d", "BatchRenorm", "BatchGroupNorm")
    )
    assert broken < 60
    assert repaired > broken + 20
    assert grouped > 90


def test_the_notebook_is_kept_with_the_outputs_of_one_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" and output.get("name") != "stderr" for c in cells for output in c.outputs)
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 2
    _check_repair(_printed(notebook))


@pytest.mark.slow
def test_the_notebook_runs_and_repairs_what_it_breaks(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    _check_repair(_printed(notebook))
