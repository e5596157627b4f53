"""A network that has learned to read what limits clip of its batches, and what inspect says of it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import renorm
from renorm_lab.networks.models import build_model

STEPS, CLASSES, EXAMPLES = 600, 10, 4  # a group of statistics is 4 examples of one class
LIMITS = {
    "tight": renorm.Limits.over(STEPS, r_max=1.5, d_max=0.5),
    "none": renorm.Limits.over(STEPS, math.inf, math.inf),
}


def ordered_by_class() -> list[tuple[Tensor, Tensor]]:
    """A batch for each step, of all classes, one after the other."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    target = torch.tensor(data.target)
    places = [torch.where(target == label)[0] for label in range(CLASSES)]
    chosen = [torch.cat([place[torch.randint(len(place), (EXAMPLES,))] for place in places]) for _ in range(STEPS)]
    return [(images[choice], target[choice]) for choice in chosen]


@pytest.fixture(scope="module", params=LIMITS)
def found(request: pytest.FixtureRequest) -> tuple[str, renorm.Inspection]:
    torch.manual_seed(0)
    limits = LIMITS[request.param]
    norm: partial[renorm.Norm] = partial(
        renorm.BatchRenorm2d, limits=limits, momentum=limits.momentum, examples_per_group=EXAMPLES
    )
    model = build_model("plain8", (1, 8, 8), CLASSES, norm)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    batches = ordered_by_class()
    for images, target in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), target).backward()
        optimizer.step()
        schedule.step()
    return request.param, renorm.inspect(model, batches[-30:])


def test_what_it_reads_through_clipping_is_told_and_without_limits_there_is_nothing_to_read(
    found: tuple[str, renorm.Inspection],
) -> None:
    limits, inspection = found
    told = [str(finding) for finding in inspection.findings if "differ through clipping" in str(finding)]
    if limits == "none":
        assert told == []
        assert all(layer.gap == layer.clipped_r == layer.clipped_d == 0 for layer in inspection.layers)
        return
    (text,) = told
    worst = max(inspection.layers, key=lambda layer: layer.gap)
    assert text.startswith(f"{worst.name}: ")
    assert f"clip {worst.clipped_r:.1%} of r and {worst.clipped_d:.1%} of d" in text
    assert "renorm.Limits.over(total_steps, math.inf, math.inf)" in text


def test_training_mode_and_evaluation_differ_by_it(found: tuple[str, renorm.Inspection]) -> None:
    limits, inspection = found
    loss = inspection.modes[1]
    assert loss.metric == "cross_entropy"
    if limits == "none":
        assert abs(loss.gap.mean) < 1e-6
    else:
        assert loss.gap.low > 0.1
