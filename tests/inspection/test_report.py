"""An inspection in a terminal, a notebook, a file and a picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import renorm


@pytest.fixture(scope="module")
def found() -> renorm.Inspection:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    data = [(torch.randn(8, 3), torch.randint(4, (8,))) for _ in range(6)]
    renorm.estimate(model, data)
    return renorm.inspect(model, data)


def test_the_text_has_scores_layers_and_findings(found: renorm.Inspection) -> None:
    lines = str(found).splitlines()
    assert lines[1].startswith("accuracy ")
    assert lines[1].split()[1] == f"{found.modes[0].evaluation.mean:.4f}"
    header = lines.index(next(line for line in lines if line.startswith("layer")))
    assert [line.split()[0] for line in lines[header + 1 : header + 3]] == ["1", "4"]
    assert len({len(line) for line in lines[header : header + 3]}) == 1
    assert lines[-len(found.findings) :] == [f"- {finding}" for finding in found.findings]


def test_a_rich_terminal_of_80_columns_shows_every_number(found: renorm.Inspection) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(found)
    shown = console.export_text()
    assert "…" not in shown
    assert f"{found.layers[0].r[0]:.2f}-{found.layers[0].r[2]:.2f}" in shown


def test_a_notebook_gets_tables_with_headers(found: renorm.Inspection) -> None:
    html = found._repr_html_()
    assert html.count("<table>") == 2
    assert html.count("<tr>") == 2 + len(found.modes) + len(found.layers)
    assert html.count("<li>") == len(found.findings)
    assert html.index("</ul>") < html.index("<table>")


def test_a_notebook_has_every_layer_marked_that_a_finding_is_about() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    data = torch.randn(400, 3).split(40)
    renorm.estimate(model, data)
    model[0].running_mean.fill_(9.0)
    model[1].running_mean.fill_(5.0)
    found = renorm.inspect(model, data)
    shift = next(finding for finding in found.findings if finding.measure == "shift")
    assert shift.layers[0] == "0"
    assert "1" in shift.others
    marked = {name for finding in found.findings for name in finding.layers}
    html = found._repr_html_()
    for name in ("0", "1", "2"):
        assert (f"<td><mark>{name}</mark></td>" in html) == (name in marked)


def test_the_table_has_a_row_for_each_layer(found: renorm.Inspection, tmp_path: Path) -> None:
    found.to_csv(tmp_path / "layers.csv")
    with (tmp_path / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["1", "4"]
    assert float(rows[1]["r_95"]) == pytest.approx(found.layers[1].r[2], rel=1e-5)
    assert list(tmp_path.iterdir()) == [tmp_path / "layers.csv"]


def test_the_picture_shows_every_layer_and_score(found: renorm.Inspection) -> None:
    panels = {axes.get_title(): axes for axes in found.plot().axes}
    assert list(panels) == ["accuracy, with 95% interval", "cross-entropy, with 95% interval", "r", "d", "range"]
    assert [label.get_text() for label in panels["r"].get_yticklabels()] == ["1", "4"]
    bound, training, evaluation = (line.get_xdata().tolist() for line in panels["range"].lines)
    assert bound == [layer.bound for layer in found.layers]
    assert training == [layer.range_training for layer in found.layers]
    assert evaluation == [layer.range_evaluation for layer in found.layers]


def test_without_a_layer_that_a_batch_reached_there_is_no_picture() -> None:
    found = renorm.inspect(nn.Sequential(nn.BatchNorm1d(3)), torch.randn(20, 3).split(4), forward=lambda model, x: x)
    with pytest.raises(ValueError, match="inspection has 1 norm layers, but no batch reached one"):
        found.plot()


def test_a_layer_that_is_not_finite_is_told_and_drawn_beside_the_others() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].running_var.fill_(torch.inf)
    model[1].running_mean.fill_(torch.nan)
    found = renorm.inspect(model, torch.randn(20, 3).split(4))
    assert "not finite" in str(found.findings[0])
    assert len(found.plot().axes[0].get_yticks()) == 3


def test_without_scores_the_picture_has_the_layers_only() -> None:
    found = renorm.inspect(nn.Sequential(nn.BatchNorm1d(3)), torch.randn(20, 3).split(4))
    assert [axes.get_title() for axes in found.plot().axes] == ["r", "d", "range"]


@pytest.mark.parametrize("name", ["[b]rich[/b]", "[/b]", r"$\frac{$", "=1+1", ":smile:"])
def test_a_layer_s_name_is_text_everywhere(name: str, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.BatchNorm1d(4))
    found = renorm.inspect(model, [torch.randn(8, 4) for _ in range(3)])
    console = Console(file=io.StringIO(), width=200)
    console.print(found)
    assert name in console.file.getvalue()
    found.to_csv(tmp_path / "layers.csv")
    with (tmp_path / "layers.csv").open(newline="") as file:
        assert list(csv.reader(file))[1][0] == ("'" if name.startswith("=") else "") + name
    found.plot().savefig(tmp_path / "layers.svg")
