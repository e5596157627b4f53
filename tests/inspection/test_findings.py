"""What numbers are worth a sentence, and that it names the layer, the number and the remedy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from renorm.inference.scores import Interval
from renorm.inspection.findings import find
from renorm.inspection.records import LayerReport, ModeReport

HEALTHY = LayerReport(
    "layer1.bn", "BatchNorm2d", 64, 1_000, 3.0, 5.0,
    batches=20, elements=512.0, r=(0.9, 1.0, 1.1), d=(-0.1, 0.0, 0.1), d_size=(0.05, 0.1), shift=0.01, scale=1.0,
    clipped_r=0.0, clipped_d=0.0, between_within=1.0, range_training=5.0, bound=22.6, range_evaluation=6.0,
)  # fmt: skip


def mode(gap: tuple[float, float, float], metric: str = "accuracy", composition: float | None = None) -> ModeReport:
    shared = None if composition is None else Interval(composition, composition - 0.01, composition + 0.01)
    score = Interval(0.5, 0.4, 0.6)
    return ModeReport(metric, metric == "accuracy", score, score, None, Interval(*gap), shared)


NO_LIMITS = "renorm.Limits.over(total_steps, math.inf, math.inf)"
NOTHING = "nothing much is to be gained at evaluation"


@pytest.mark.parametrize("modes", [[], [mode((0.01, -0.01, 0.03))], [mode((-0.05, -0.06, -0.04))]])
def test_of_healthy_layers_it_says_that_nothing_is_to_be_gained(modes: list[ModeReport]) -> None:
    findings = find([HEALTHY, HEALTHY], modes)
    assert len(findings) == len(modes) + 1
    assert NOTHING in str(findings[-1])


@pytest.mark.parametrize(
    ("change", "measure", "said"),
    [
        ({"batches": 0}, "batches", ["no batch reached it"]),
        ({"steps": 0}, "steps", ["never been moved", "renorm.estimate"]),
        ({"plain_until": 5_000}, "plain_until", ["until step 5000", "at 1000 now", "Limits.over"]),
        ({"shift": 0.8}, "shift", ["0.80 standard deviations", "renorm.estimate"]),
        ({"scale": 0.5}, "scale", ["0.50 of the running one", "renorm.estimate"]),
        ({"between_within": 12.3}, "between_within", ["12.3 times", "dependent=True"]),
        ({"d_size": (0.5, 1.7)}, "d_size_95", ["up to 1.70", "renorm.weigh"]),
        ({"r": (0.4, 1.0, 1.2)}, "r", ["0.40 to 1.20", "renorm.weigh"]),
        (
            {"clipped_d": 0.12, "corrected": True},
            "clipped",
            ["clip 0.0% of r and 12.0% of d", "leaks into training", "wider limits or none", NO_LIMITS],
        ),
        (
            {"clipped_r": 0.3, "clipped_d": 0.12, "gap": 0.27, "corrected": True},
            "gap",
            [
                "training and evaluation differ through clipping",
                "clip 30.0% of r and 12.0% of d",
                "differ by 0.27",
                "wider limits or none",
                NO_LIMITS,
                "renorm.Limits.constant(math.inf, math.inf)",
            ],
        ),
        ({"range_evaluation": 50.0}, "range_evaluation", ["reach 50.0", "22.6", "m = 512", "renorm.weigh"]),
        ({"dead": 3, "nearly_dead": 2}, "dead", ["3 of 64 channels are dead", "2 nearly", "pruned"]),
        ({"elements": 2.0}, "elements", ["2 elements have hardly any statistics", "renorm.BatchGroupNorm"]),
        ({"elements": 1.0, "r": (0.003,) * 3, "clipped_r": 1.0}, "elements", ["one element has hardly any statistics"]),
    ],
)
def test_each_trouble_is_named_with_layer_number_and_remedy(
    change: dict[str, Any], measure: str, said: list[str]
) -> None:
    ill = replace(HEALTHY, name="layer4.bn", **change)
    (finding,) = find([HEALTHY, ill], [])
    assert (finding.layer, finding.measure) == ("layer4.bn", measure)
    assert str(finding).startswith("layer4.bn: ")
    assert all(words in str(finding) for words in said), str(finding)


@pytest.mark.parametrize(
    "change",
    [
        {"d_size": (0.5, 1.7)},
        {"r": (0.4, 1.0, 1.2)},
        {"range_evaluation": 50.0},
        {"gap": 0.27, "corrected": True},
    ],
)
@pytest.mark.parametrize(
    ("gap", "told"),
    [
        ((0.21, 0.19, 0.23), True),
        ((0.2, -0.01, 0.41), True),  # so few data that they rule out nothing
        ((math.nan,) * 3, True),
        ((0.001, -0.01, 0.012), False),
        ((-0.2, -0.3, -0.1), False),
    ],
)
def test_what_would_explain_a_loss_is_told_where_evaluation_may_lose(
    change: dict[str, Any], gap: tuple[float, float, float], told: bool
) -> None:
    findings = find([replace(HEALTHY, **change)], [mode(gap)])
    assert (findings[-1].layer == "layer1.bn") == told
    assert told or "evaluation loses nothing by it" in str(findings[-1])
    assert not any(NOTHING in str(finding) for finding in findings)


@pytest.mark.parametrize("change", [{"d_size": (0.5, 5.9)}, {"r": (0.2, 1.0, 1.2)}])
def test_what_a_layer_corrects_is_no_trouble(change: dict[str, Any]) -> None:
    (finding,) = find([replace(HEALTHY, corrected=True, **change)], [])
    assert NOTHING in str(finding)
    (dependent,) = find([replace(HEALTHY, corrected=True, between_within=9.0)], [])
    assert str(dependent).endswith("batches are dependent; the layer corrects for it within limits of 3 and 5")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d_size": (0.5, 5.0)}, "up to 5.00 running standard deviations from the running mean (95% of |d|), and the "
         "layer corrects no more than 0.5"),
        ({"r": (0.2, 1.0, 1.2)}, "(5 to 95% of r), and the layer corrects no more than 1.5"),
    ],
)  # fmt: skip
def test_what_limits_leave_uncorrected_is_trouble(change: dict[str, Any], said: str) -> None:
    (finding,) = find([replace(HEALTHY, corrected=True, r_max=1.5, d_max=0.5, **change)], [])
    assert said in str(finding)
    assert "renorm.weigh" in str(finding)


def test_nobody_is_told_that_limits_clip_who_has_none() -> None:
    (finding,) = find([replace(HEALTHY, clipped_r=0.5, gap=0.9)], [])
    assert NOTHING in str(finding)


@pytest.mark.parametrize(("loss", "measure"), [(0.2, "gap"), (-0.2, "clipped")])
def test_clipping_is_told_once_and_as_the_cause_of_a_loss_where_there_is_one(loss: float, measure: str) -> None:
    clipped = replace(HEALTHY, corrected=True, clipped_r=0.3, gap=0.2)
    layers = [clipped, replace(clipped, name="worst", clipped_r=0.4, gap=0.4)]
    _, finding = find(layers, [mode((loss, loss - 0.1, loss + 0.1))])
    assert (finding.layer, finding.measure) == ("worst", measure)
    assert "and 1 of 2 layers more" in str(finding)


@pytest.mark.parametrize("gap", [0.0, 0.08])  # the latter of independent examples, by 4, within 1.5 and 0.5
def test_a_small_difference_through_clipping_is_none(gap: float) -> None:
    findings = find([replace(HEALTHY, corrected=True, clipped_r=0.04, gap=gap)], [mode((0.2, 0.1, 0.3))])
    assert [finding.layer for finding in findings] == [None]


def test_limits_that_are_infinite_are_none() -> None:
    layer = replace(HEALTHY, corrected=True, r_max=math.inf, d_max=math.inf, between_within=9.0, range_evaluation=50.0)
    (finding,) = find([layer], [])
    assert str(finding).endswith("batches are dependent; the layer corrects for it without limits")


def test_values_reach_as_far_in_training_as_limits_let_them() -> None:
    layer = replace(HEALTHY, corrected=True, r_max=1.5, d_max=0.5, range_evaluation=34.0)  # of 1.5 * 22.6 + 0.5
    assert NOTHING in str(find([layer], [])[0])
    (finding,) = find([replace(layer, range_evaluation=35.0)], [])
    assert "cannot exceed 34.4 in training (sqrt(m - 1) for m = 512, within limits of 1.5 and 0.5)" in str(finding)


def test_a_loss_of_training_mode_that_shuffling_mends_is_laid_to_dependence() -> None:
    (finding,) = find([HEALTHY], [mode((-0.21, -0.23, -0.19), composition=-0.2)])
    assert "examples that belong together shift their batch's statistics" in str(finding)
    assert "dependent=True" in str(finding)


def test_gamma_that_begins_at_0_does_not_make_an_untrained_layers_channels_dead() -> None:
    findings = find([replace(HEALTHY, steps=0, dead=64)], [])
    assert [finding.measure for finding in findings] == ["steps"]


@pytest.mark.parametrize(
    ("change", "measures"),
    [
        ({"r": (math.nan,) * 3}, ["finite", "elements"]),
        ({"steps": 0}, ["elements", "steps"]),
        ({"shift": 2.0}, ["elements", "shift"]),
        ({"between_within": 9.0}, ["elements", "between_within"]),
        ({"scale": 0.003, "d_size": (1.0, 9.0)}, ["elements"]),
    ],
)
def test_batches_of_one_element_hide_no_other_trouble(change: dict[str, Any], measures: list[str]) -> None:
    findings = find([replace(HEALTHY, elements=1.0, **change)], [])
    assert [finding.measure for finding in findings] == measures


def test_few_elements_are_told_of_the_layer_with_fewest() -> None:
    layers = [replace(HEALTHY, name=f"bn{m:.0f}", elements=m) for m in (3.0, 2.0, 4.0)]
    (finding,) = find(layers, [])
    assert (finding.layer, finding.value) == ("bn2", 2)
    assert "and 1 of 3 layers more" in str(finding)


def test_one_finding_tells_of_the_worst_layer_and_counts_the_others() -> None:
    layers = [replace(HEALTHY, name=f"bn{i}", between_within=float(10 * i)) for i in range(4)]
    (finding,) = find(layers, [])
    assert finding.layer == "bn3"
    assert finding.value == 30
    assert "and 2 of 4 layers more" in str(finding)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (mode((0.21, 0.19, 0.23)), ["evaluation loses 21.0 points of accuracy", "19.0 to 23.0", "try renorm.weigh"]),
        (mode((-0.21, -0.23, -0.19)), ["training mode loses 21.0 points", "see renorm.recommend(batch_size="]),
        (mode((0.01, -0.01, 0.03)), ["do not differ for sure"]),
        (mode((0.001, 0.0005, 0.002)), ["do not differ for sure"]),
        (mode((5e-9, 3e-9, 7e-9), "cross_entropy"), ["do not differ for sure"]),  # rounding
        (mode((0.4, 0.3, 0.5), "cross_entropy"), ["evaluation loses 0.4 of cross-entropy", "try renorm.weigh"]),
    ],
)
def test_the_gap_between_the_modes_is_told_with_its_interval(report: ModeReport, said: list[str]) -> None:
    finding = find([HEALTHY], [report])[0]
    assert finding.layer is None
    assert all(words in str(finding) for words in said), str(finding)


def test_trouble_is_never_called_nothing() -> None:
    for layers, modes in (([HEALTHY], [mode((0.2, 0.1, 0.3))]), ([replace(HEALTHY, between_within=5.0)], [])):
        assert not any(NOTHING in str(finding) for finding in find(layers, modes))


@pytest.mark.parametrize(
    "change",
    [
        {"r": (math.nan,) * 3},
        {"shift": math.nan, "scale": math.nan},
        {"r": (0.0, 0.0, 0.0), "scale": 0.0},  # an infinite running variance
        {"r": (0.0, 1.0, 1.1)},
        {"d": (-math.inf, 0.0, 0.1)},
        {"range_evaluation": math.inf},
    ],
)
def test_numbers_that_are_not_finite_are_no_advice(change: dict[str, Any]) -> None:
    ill = replace(HEALTHY, name="bn", between_within=10.0, dead=1, **change)
    (finding,) = find([HEALTHY, ill], [])
    assert (finding.layer, finding.measure) == ("bn", "finite")
    assert str(finding) == ("bn: its batches or its running statistics are not finite: its other numbers say nothing")


def test_layers_that_are_not_finite_come_first() -> None:
    layers = [replace(HEALTHY, name="unused", batches=0), replace(HEALTHY, name="bn", scale=math.inf)]
    assert [finding.measure for finding in find(layers, [])] == ["finite", "batches"]


@pytest.mark.parametrize("gap", [(math.nan,) * 3, (math.nan, 0.1, 0.2), (math.inf,) * 3])
def test_scores_that_are_not_finite_are_no_advice(gap: tuple[float, float, float]) -> None:
    report = replace(mode(gap, "cross_entropy"), composition=Interval(*(math.nan,) * 3))
    (finding,) = find([HEALTHY], [report])
    assert str(finding) == "cross-entropy is not finite in evaluation or training mode: look for NaN in outputs"


def test_what_is_read_from_the_batch_s_composition_is_told() -> None:
    findings = find([], [mode((0.2, 0.1, 0.3), composition=0.3)])
    assert "30.0 points of accuracy better on batches as they come" in str(findings[1])
    assert str(findings[1]).endswith("train with renorm.BatchRenorm, or on batches that are more mixed")
    assert len(find([], [mode((0.2, 0.1, 0.3), composition=0.005)])) == 1


def test_who_trains_with_batch_renorm_is_told_to_let_it_correct_more() -> None:
    findings = find([replace(HEALTHY, corrected=True)], [mode((0.2, 0.1, 0.3), composition=0.3)])
    assert NO_LIMITS in str(findings[1])
    assert "renorm.BatchRenorm" not in str(findings[1])
