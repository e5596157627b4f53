"""Pictures of results."""

from __future__ import annotations

from dataclasses import replace

import pytest

from renorm_lab.report.plots import draw_bars, draw_curves
from renorm_lab.runs import CurvePoint
from renorm_lab.summary import Cell, Summary

from .test_parts import result, run


@pytest.mark.parametrize(
    ("accuracies", "end"), [((10.0, 14.0, 12.0), 1.1 * 14), ((96.0, 99.0, 98.0), 102), ((0.0,), 1)]
)
def test_bars_fill_their_panels_which_have_one_scale(accuracies: tuple[float, ...], end: float):
    cells = {(f"method with {accuracy}", "n = 4"): Cell((accuracy,)) for accuracy in accuracies}
    summary = Summary([method for method, _ in cells], ["n = 4", "n = 2"], cells, cells)
    panels = draw_bars(summary, summary.regimes, "a table").axes[:2]
    assert [axes.get_xlim() for axes in panels] == [pytest.approx((0, end))] * 2
    assert [bar.get_width() for bar in panels[0].patches] == 2 * list(accuracies)


def test_whiskers_end_within_the_panel():
    summary = Summary(["batch norm"], ["n = 4"], {("batch norm", "n = 4"): Cell((10.0, 50.0))}, {})
    (panel,) = draw_bars(summary, summary.regimes, "a table").axes[:1]
    assert panel.get_xlim()[1] > 30 + 28.3


def test_the_number_of_a_bar_shorter_than_it_is_not_taken_for_the_bar():
    cells = {("long", "n = 4"): Cell((60.0,)), ("none", "n = 4"): Cell((0.0,))}
    (panel,) = draw_bars(Summary(["long", "none"], ["n = 4"], cells, cells), ["n = 4"], "a table").axes[:1]
    behind = {text.get_text(): text.get_bbox_patch().get_facecolor() for text in panel.texts}
    assert behind["0.0"] == (1, 1, 1, 1) != behind["60.0"]


def test_a_long_title_stays_within_its_picture():
    summary = Summary(["batch norm"], ["i.i.d."], *[{("batch norm", "i.i.d."): Cell((10.0,))}] * 2)
    figure = draw_bars(summary, ["i.i.d."], "Example weighing on trained models: resnet8 on data/cifar100.npz")
    title = figure.get_suptitle()
    assert max(map(len, title.splitlines())) < len(title)
    figure.canvas.draw()
    edges = figure._suptitle.get_window_extent()
    assert 0 <= edges.x0 < edges.x1 <= figure.bbox.x1


@pytest.mark.parametrize("panels", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["batch norm", "batch norm, frozen for the last 50%"])
def test_a_legend_stays_within_its_picture(panels: int, name: str):
    methods, regimes = [f"{name} {number}" for number in range(6)], [f"n = {number}" for number in range(panels)]
    cells = {(method, regime): Cell((10.0,)) for method in methods for regime in regimes}
    curve = (CurvePoint(1, 1.0, 0.1), CurvePoint(2, 0.5, 0.2))
    results = {run(method=method, regime=regime): replace(result(0.1, 0.1), curve=curve) for method, regime in cells}
    figure = draw_curves(results, Summary(methods, regimes, cells, cells), regimes, "a table")
    figure.canvas.draw()
    edges = figure.legends[0].get_window_extent()
    assert 0 <= edges.x0 < edges.x1 <= figure.bbox.x1
