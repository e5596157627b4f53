"""What is recommended, and that its figures are those of the committed files."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import pytest
import torch
from torch import nn

import renorm
from renorm.recommendation import Evidence, decide, recommend

_ROOT = Path(__file__).parents[1]
_EVIDENCE = {name: value for name, value in vars(decide).items() if isinstance(value, Evidence)}
_STEPS = 20_000
_WORKERS = {"dependent": True, "independent_gradient": True}


def _of_the_lab(evidence: Evidence, method: str) -> list[float]:
    name, weighed = method.removesuffix(", weighed"), method.endswith(", weighed")
    setting = evidence.setting
    if name == "batch norm, synchronized":  # a column of its own
        name, setting = "batch norm", "synchronized"
    with (_ROOT / evidence.file).open() as file:
        rows = [row for row in csv.DictReader(file) if row["regime"] == setting]
    named = [row for row in rows if row["method"] == name] or [
        row for row in rows if row["method"].partition(",")[0] == name
    ]
    steps = {int(row["steps"]) for row in named}
    sizes = {int(row["examples_per_group"] or row["batch_size"]) for row in named}
    assert steps == {evidence.steps}
    if name == "batch norm" and setting == evidence.setting:
        assert sizes == {evidence.group_size}
    return [100 * float(row["test_accuracy_on" if weighed else "test_accuracy_off"]) for row in named]


def _of_crossq(evidence: Evidence, method: str) -> list[float]:
    norm = {"batch renorm": "renorm", "batch norm": "batch", "no norm": "none"}[method]
    with (_ROOT / evidence.file).open() as file:
        return [float(row["return"]) for row in csv.DictReader(file) if row["norm"] == norm]


def _of_the_gan(evidence: Evidence, method: str) -> list[float]:
    norm = {"batch renorm": "renorm", "batch norm": "batch"}[method]
    with (_ROOT / evidence.file).open() as file:
        rows = [row for row in csv.DictReader(file) if row["norm"] == norm]
    return [100 * float(row["accuracy_eval"]) for row in rows if int(row["step"]) > evidence.steps * 2 / 3]


@pytest.mark.parametrize("name", _EVIDENCE)
def test_figures_are_those_of_the_files(name: str):
    evidence = _EVIDENCE[name]
    read = {"CROSSQ": _of_crossq, "GAN": _of_the_gan}.get(name, _of_the_lab)
    for method, figure in evidence.figures.items():
        values = read(evidence, method)
        assert len(values) >= 3, method
        assert figure == pytest.approx(mean(values), abs=0.051), method


@pytest.mark.parametrize(
    ("situation", "layer"),
    [
        ({"batch_size": 64}, None),
        ({"batch_size": 64, "pretrained": True}, None),
        ({"batch_size": 64, "dependent": True}, renorm.BatchRenorm),
        ({"batch_size": 64, "dependent": True, "pretrained": True}, renorm.BatchRenorm),
        ({"batch_size": 8}, renorm.BatchRenorm),
        ({"batch_size": 4, "total_steps": 2_000, "pretrained": True}, renorm.BatchRenorm),
        ({"batch_size": 2}, renorm.BatchRenorm),
        ({"batch_size": 8, "positions": False}, None),
        ({"batch_size": 2, "positions": False}, renorm.BatchGroupNorm),
        ({"batch_size": 1, "positions": False}, renorm.BatchGroupNorm),
        ({"batch_size": 2, "positions": False, "plain": True}, renorm.BatchRenorm),
        (_WORKERS | {"batch_size": 64}, renorm.BatchNorm),
        (_WORKERS | {"batch_size": 64, "can_synchronize": True}, renorm.BatchNorm),
        ({"batch_size": 4, "task": "federated"}, renorm.BatchNorm),
        ({"batch_size": 2, "task": "segmentation"}, renorm.BatchNorm),
        ({"batch_size": 2, "task": "detection", "pretrained": True}, renorm.BatchRenorm),
        ({"batch_size": 64, "task": "metric"}, renorm.GhostBatchNorm),
        ({"batch_size": 15, "task": "metric"}, None),
        ({"batch_size": 256, "task": "reinforcement"}, renorm.BatchRenorm),
        ({"batch_size": 64, "task": "gan"}, renorm.BatchRenorm),
    ],
    ids=str,
)
def test_layer_of_a_situation(situation: dict[str, Any], layer: type[renorm.Norm] | None):
    advice = recommend(**{"total_steps": _STEPS} | situation)
    assert advice.layer is layer
    assert advice.evidence
    assert "How sure:" in str(advice)


@pytest.mark.parametrize("task", [task for task in get_args(decide.Task) if task != "classification"])
def test_what_a_task_assumes_can_be_denied(task: str):
    said = {"dependent": False, "independent_gradient": False, "positions": True}
    denied = recommend(batch_size=64, total_steps=_STEPS, task=task, **said)
    if task in ("reinforcement", "gan"):  # whose several forwards are there whatever depends on what
        assert denied.layer is renorm.BatchRenorm
    else:
        assert denied == recommend(batch_size=64, total_steps=_STEPS)


@pytest.mark.parametrize("situation", [_WORKERS, {"task": "segmentation"}, {"task": "federated"}], ids=str)
def test_batch_norm_that_reads_its_batch_is_frozen_at_the_end(situation: dict[str, Any]):
    advice = recommend(batch_size=4, total_steps=_STEPS, **situation)
    assert (advice.frozen_share, advice.weigh) == (0.5, False)
    assert f"renorm.LateFreeze(model, at={_STEPS // 2})" in advice.code
    synchronized = recommend(batch_size=4, total_steps=_STEPS, can_synchronize=True, **_WORKERS)
    assert (synchronized.frozen_share, synchronized.options) == (0.0, {"sync": "batch"})


@pytest.mark.parametrize(("batch_size", "ends"), [(1, (3, 5)), (2, (3, 5)), (4, (1.5, 0.5)), (8, (1.5, 0.5))])
def test_fine_tuning_has_constant_limits(batch_size: int, ends: tuple[float, float]):
    advice = recommend(batch_size=batch_size, total_steps=_STEPS, pretrained=True)
    assert advice.options["limits"] == renorm.Limits.constant(*ends)
    assert advice.evidence[0].group_size == batch_size  # the nearest


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
    assert not advice.weigh
    model = renorm.to_batchnorm(advice.apply(nn.Sequential(nn.BatchNorm1d(16))))
    assert type(model[0]) is nn.BatchNorm1d


def test_the_number_of_steps_changes_lengths_alone():
    for batch_size in (2, 8, 64):
        names = {recommend(batch_size=batch_size, total_steps=steps).name for steps in (100, 9_999, 10_000, 130_000)}
        assert len(names) == 1


@pytest.mark.parametrize(
    ("batch_size", "other"),
    [
        (15, "From 16 examples on it would be: nn.BatchNorm."),
        (8, "From 16 examples on it would be: nn.BatchNorm."),
        (16, "Below 16 examples it would be: BatchRenorm, r to 1.5, d to 0.5."),
    ],
)
def test_near_a_boundary_its_other_side_is_told(batch_size: int, other: str):
    advice = recommend(batch_size=batch_size, total_steps=_STEPS)
    assert other in advice.otherwise
    assert other in " ".join(str(advice).split())


@pytest.mark.parametrize("batch_size", [7, 64])
def test_far_from_a_boundary_none_is_told(batch_size: int):
    assert not recommend(batch_size=batch_size, total_steps=_STEPS).otherwise


def test_how_sure_names_the_nearest_setting_and_one_s_own():
    advice = recommend(batch_size=2, total_steps=7_000, pretrained=True)
    assert "it was ahead of batch norm for certain" in advice.sure
    assert "2 examples that share statistics, 800 steps (yours: 2 and 7,000)" in advice.sure
    assert "not for certain" in recommend(batch_size=8, total_steps=7_000, pretrained=True).sure
    assert "the best was batch norm;" in recommend(batch_size=64, total_steps=7_000).sure
    assert "it was ahead of batch norm for certain" in recommend(batch_size=64, total_steps=7_000, dependent=True).sure
    assert "it was not ahead of batch norm" in recommend(batch_size=1, total_steps=7_000, task="segmentation").sure


def test_what_it_costs_is_told():
    assert "ONNX Runtime" in str(recommend(batch_size=2, total_steps=_STEPS))
    assert not recommend(batch_size=2, total_steps=_STEPS, plain=True).costs
    synchronized = recommend(batch_size=2, total_steps=_STEPS, can_synchronize=True, **_WORKERS)
    assert "1.3 times as long" in " ".join(synchronized.costs)


@pytest.mark.parametrize("total_steps", [10, 1_000, 8_000, 130_000])
def test_little_of_the_initial_statistics_is_left_when_the_correction_starts(total_steps: int):
    (layer,) = recommend(batch_size=2, total_steps=total_steps).apply(nn.Sequential(nn.BatchNorm2d(4)))
    limits, momentum = layer.limits, layer.momentum
    assert 0.01 <= momentum <= 0.1
    if momentum < 0.1:  # a training too short for that has the momentum of nn.BatchNorm
        assert (1 - momentum) ** limits.start < 0.06
    assert limits.start > 0


@pytest.mark.parametrize(
    "situation",
    [
        {"batch_size": 2, "plain": True}, {"batch_size": 4, **_WORKERS}, {"batch_size": 8, "pretrained": True},
        {"batch_size": 1, "pretrained": True}, {"batch_size": 2, "task": "segmentation"},
    ],
    ids=str,
)  # fmt: skip
def test_it_prints_as_code_that_runs(situation: dict[str, Any]):
    advice = recommend(total_steps=1_000, **situation)
    assert str(advice).startswith(advice.code)
    names: dict[str, Any] = {"renorm": renorm, "model": nn.Sequential(nn.BatchNorm2d(4)), "validation": None}
    exec(advice.code, names)
    applied = advice.apply(nn.Sequential(nn.BatchNorm2d(4)))
    assert repr(names["model"]) == repr(applied)


def test_in_a_notebook_it_is_html():
    html = recommend(batch_size=2, total_steps=1_000)._repr_html_()
    assert html.startswith("<pre>model = renorm.convert(")
    synchronized = recommend(batch_size=2, total_steps=9, can_synchronize=True, **_WORKERS)
    assert "sync=&#x27;batch&#x27;" in synchronized._repr_html_()
    assert html.count("<li>") == 2


def test_numbers_below_one_and_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        recommend(batch_size=0, total_steps=1)
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        recommend(batch_size=1, total_steps=0)
    with pytest.raises(ValueError, match=r"task must be one of classification, .*, federated, got 'vision'"):
        recommend(batch_size=1, total_steps=1, task="vision")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "question", ["dependent", "independent_gradient", "pretrained", "positions", "plain", "can_synchronize"]
)
def test_answers_are_yes_or_no(question: str):
    with pytest.raises(TypeError, match=f"{question} must be True or False, got 'no'"):
        recommend(batch_size=4, total_steps=100, **{question: "no"})
    computed = torch.tensor([1]).any()
    assert recommend(batch_size=4, total_steps=100, **{question: computed}) == recommend(
        batch_size=4, total_steps=100, **{question: True}
    )
