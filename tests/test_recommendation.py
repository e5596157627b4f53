"""What is recommended, and that its figures are those of the committed files."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import nn

import renorm
from renorm import recommendation
from renorm.recommendation import Evidence, recommend

_ROOT = Path(__file__).parents[1]
_OF_FINETUNING = {"batch renorm": "renorm", "batch norm": "batch", "frozen": "frozen"}
_EVIDENCE = [value for value in vars(recommendation).values() if isinstance(value, Evidence)]
_STEPS = 20_000


def _of_the_lab(rows: list[dict[str, str]], evidence: Evidence, method: str) -> list[dict[str, str]]:
    rows = [row for row in rows if row["regime"] == evidence.setting]
    named = [row for row in rows if row["method"] == method]
    return named or [row for row in rows if row["method"].partition(",")[0] == method]


def _of_finetuning(rows: list[dict[str, str]], evidence: Evidence, method: str) -> list[dict[str, str]]:
    """At the learning rate that was chosen, which alone has all seeds."""
    assert evidence.setting == "batches of 2"
    found = [row for row in rows if (row["batch"], row["method"]) == ("2", _OF_FINETUNING[method])]
    (chosen,) = {row["rate"] for row in found if row["seed"] == "2"}
    return [row for row in found if row["rate"] == chosen]


@pytest.mark.skipif(not (_ROOT / "results").exists(), reason="an sdist holds no results")
@pytest.mark.parametrize("evidence", _EVIDENCE, ids=lambda evidence: f"{evidence.file} {evidence.setting}")
def test_figures_are_those_of_the_files(evidence: Evidence):
    with (_ROOT / evidence.file).open() as file:
        rows = list(csv.DictReader(file))
    for method, accuracy in evidence.accuracies.items():
        name, weighed = method.removesuffix(", weighed"), method.endswith(", weighed")
        if "finetune" in evidence.file:
            values = [float(row["test_off"]) for row in _of_finetuning(rows, evidence, name)]
        else:
            column = "test_accuracy_on" if weighed else "test_accuracy_off"
            values = [100 * float(row[column]) for row in _of_the_lab(rows, evidence, name)]
        assert len(values) == 3, method
        assert accuracy == pytest.approx(mean(values), abs=0.051), method


@pytest.mark.parametrize(
    ("situation", "layer", "weigh"),
    [
        ({"batch_size": 64}, None, True),
        ({"batch_size": 64, "pretrained": True}, None, True),
        ({"batch_size": 64, "plain": True}, None, False),
        ({"batch_size": 64, "dependent": True}, renorm.BatchRenorm, False),
        ({"batch_size": 64, "dependent": True, "total_steps": 2_000}, None, True),
        ({"batch_size": 64, "dependent": True, "total_steps": 2_000, "plain": True}, None, False),
        ({"batch_size": 2, "dependent": True, "total_steps": 2_000}, renorm.BatchRenorm, True),
        ({"batch_size": 64, "dependent": True, "pretrained": True}, renorm.BatchRenorm, False),
        ({"batch_size": 8}, renorm.BatchRenorm, True),
        ({"batch_size": 8, "plain": True}, renorm.BatchRenorm, False),
        ({"batch_size": 8, "total_steps": 2_000}, None, True),
        ({"batch_size": 8, "total_steps": 2_000, "plain": True}, None, False),
        ({"batch_size": 4, "total_steps": 2_000, "pretrained": True}, renorm.BatchRenorm, False),
        ({"batch_size": 2}, renorm.BatchRenorm, True),
        ({"batch_size": 2, "total_steps": 2_000}, renorm.BatchRenorm, True),
        ({"batch_size": 2, "total_steps": 2_000, "plain": True}, renorm.BatchRenorm, False),
        ({"batch_size": 2, "positions": False}, renorm.BatchGroupNorm, False),
        ({"batch_size": 1, "positions": False}, renorm.BatchGroupNorm, False),
        ({"batch_size": 2, "positions": False, "plain": True}, renorm.BatchRenorm, False),
    ],
    ids=str,
)
def test_layer_of_a_situation(situation: dict[str, Any], layer: type[renorm.Norm] | None, weigh: bool):
    advice = recommend(**{"total_steps": _STEPS} | situation)
    assert (advice.layer, advice.weigh) == (layer, weigh)
    assert advice.evidence


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Sequential(nn.BatchNorm2d(16)), (2, 16, 4, 4)), (lambda: nn.Sequential(nn.BatchNorm1d(16)), (2, 16))],
    ids=["2d", "1d"],
)
@pytest.mark.parametrize("batch_size", [1, 2, 8, 64])
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("total_steps", [100, _STEPS])
def test_it_can_be_applied_and_trained(
    make: Callable[[], nn.Module], shape: tuple[int, ...], batch_size: int, dependent: bool, total_steps: int
):
    positions = len(shape) > 2
    advice = recommend(batch_size=batch_size, total_steps=total_steps, dependent=dependent, positions=positions)
    model = advice.apply(make())
    assert isinstance(model[0], renorm.Norm) == (advice.layer is not None)
    assert model(torch.randn(shape)).isfinite().all()


@pytest.mark.parametrize("batch_size", [2, 8, 64])
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("total_steps", [100, _STEPS, 130_000])
def test_what_must_be_plain_can_be(batch_size: int, dependent: bool, positions: bool, total_steps: int):
    situation = {"batch_size": batch_size, "dependent": dependent, "positions": positions}
    advice = recommend(total_steps=total_steps, plain=True, **situation)
    assert "weigh" not in str(advice).partition("\n- ")[0]
    model = renorm.to_batchnorm(advice.apply(nn.Sequential(nn.BatchNorm1d(16))))
    assert type(model[0]) is nn.BatchNorm1d


@pytest.mark.parametrize(("batch_size", "dependent"), [(2, False), (4, False), (64, True)])
@pytest.mark.parametrize(("total_steps", "ends"), [(20_000, (1.5, 0.5)), (59_999, (1.5, 0.5)), (130_000, (3, 5))])
def test_limits_are_closer_than_the_paper_s_where_trainings_are_shorter_by_far(
    batch_size: int, dependent: bool, total_steps: int, ends: tuple[float, float]
):
    advice = recommend(batch_size=batch_size, total_steps=total_steps, dependent=dependent)
    assert advice.options["limits"] == renorm.Limits.over(total_steps, *ends)


def test_smaller_groups_are_recommended_only_where_there_are_some():
    assert "GhostBatchNorm" in recommend(batch_size=64, total_steps=1_000, dependent=True).why
    assert "GhostBatchNorm" not in recommend(batch_size=16, total_steps=1_000, dependent=True).why


@pytest.mark.parametrize("total_steps", [10, 1_000, 8_000, 130_000])
def test_little_of_the_initial_statistics_is_left_when_the_correction_starts(total_steps: int):
    (layer,) = recommend(batch_size=2, total_steps=total_steps).apply(nn.Sequential(nn.BatchNorm2d(4)))
    limits, momentum = layer.limits, layer.momentum
    assert 0.01 <= momentum <= 0.1
    if momentum < 0.1:  # a training too short for that has the momentum of nn.BatchNorm
        assert (1 - momentum) ** limits.start < 0.06
    assert limits.start > 0


def test_it_prints_as_code_that_runs():
    text = str(recommend(batch_size=2, total_steps=1_000, plain=True))
    names: dict[str, Any] = {"renorm": renorm, "model": nn.Sequential(nn.BatchNorm2d(4))}
    exec(text[: text.index("\n)") + 2], names)
    assert isinstance(names["model"][0], renorm.BatchRenorm2d)
    assert names["model"][0].limits == renorm.Limits.over(1_000, 1.5, 0.5)


def test_a_notebook_gets_what_is_printed():
    found = recommend(batch_size=2, total_steps=1_000)
    html = found._repr_html_()
    code = html[len("<pre>") : html.index("</pre>")]
    assert str(found).startswith(f"{code}\n")
    assert html.count("<li>") == len(found.evidence)


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        recommend(batch_size=0, total_steps=1)
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        recommend(batch_size=1, total_steps=0)


@pytest.mark.parametrize("question", ["dependent", "pretrained", "positions", "plain"])
def test_answers_are_yes_or_no(question: str):
    with pytest.raises(TypeError, match=f"{question} must be True or False, got 'no'"):
        recommend(batch_size=4, total_steps=100, **{question: "no"})
    computed = torch.tensor([1]).any()
    assert recommend(batch_size=4, total_steps=100, **{question: computed}) == recommend(
        batch_size=4, total_steps=100, **{question: True}
    )
