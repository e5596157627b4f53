"""Numbers of norm layers during training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import renorm
from renorm.integrations.monitor import monitor

LIMITS = renorm.Limits.constant(r_max=1.2, d_max=0.1)


def network(*norms: nn.Module) -> nn.Sequential:
    layers = [layer for norm in norms for layer in (nn.Conv2d(4, 4, 3, padding=1), norm, nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def train(model: nn.Module, steps: int = 4, forward: Any = None) -> list[Tensor]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(7, 4, 5, 5) + 0.5
        (forward or model)(x).square().mean().backward()
        optimizer.step()
    return [tensor.clone() for tensor in model.state_dict().values()]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_the_training_is_the_same_bit_for_bit(fuse: bool) -> None:
    model = network(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model = renorm.convert(model, renorm.BatchRenorm, limits=LIMITS, fuse=fuse)
    watched = copy.deepcopy(model)
    with monitor(watched, every=2) as watch:
        after = train(watched)
    assert watch.compute()
    for expected, actual in zip(train(model), after, strict=True):
        assert torch.equal(expected, actual)


OPTIONS: dict[str, dict[str, Any]] = {
    "batch": {},
    "ghost": {"examples_per_group": 3},
    "channel groups": {"channels_per_group": 2},
    "both": {"examples_per_group": 2, "channels_per_group": 2},
}


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gap_is_what_training_and_evaluation_differ_by(options: dict[str, Any], masked: bool) -> None:
    layer = renorm.BatchRenorm2d(4, eps=0.5, limits=LIMITS, affine=False, **options)
    layer.running_mean.copy_(torch.tensor([0.1, 0.6, 0.4, -1.0]))
    layer.running_var.copy_(torch.tensor([1.0, 0.5, 4.0, 1.0]))
    x = torch.randn(6, 4, 5, 5)
    mask = torch.arange(5).expand(6, 5, 5) < 4 if masked else None  # of every group the same share
    evaluated = copy.deepcopy(layer).eval()(x, mask)
    with monitor(layer, every=1) as watch:
        difference = (layer(x, mask=mask) - evaluated).square()
    expected = difference.sum() / (4 * 6 * 5 * (4 if masked else 5))
    assert watch.compute()["gap/"] == pytest.approx(float(expected.sqrt()), rel=1e-4)


def test_r_and_d_are_those_of_the_paper() -> None:
    layer = renorm.BatchRenorm1d(3, limits=LIMITS, eps=0.0)
    layer.running_mean.copy_(torch.tensor([0.0, 1.0, 2.0]))
    layer.running_var.fill_(4.0)
    with monitor(layer, every=1) as watch:
        layer(torch.tensor([[-1.0, -2.0, 0.0], [1.0, 2.0, 6.0]]))
    found = watch.compute()
    assert [found[f"r_{q}/"] for q in ("low", "median", "high")] == pytest.approx([0.5, 1.0, 1.5])
    assert [found[f"d_{q}/"] for q in ("low", "median", "high")] == pytest.approx([-0.5, 0.0, 0.5])
    assert (found["clipped_r/"], found["clipped_d/"]) == pytest.approx((2 / 3, 2 / 3))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, renorm.BatchNorm2d, renorm.BatchRenorm2d])
def test_without_limits_or_before_their_start_all_of_it_is_a_gap(norm: type[nn.Module]) -> None:
    with monitor(model := network(norm(4)), every=1) as watch:
        train(model)
    found = watch.compute()
    assert found["clipped_r/1"] == found["clipped_d/1"] == 1
    assert found["gap/1"] > 0


def test_without_clipping_there_is_no_gap() -> None:
    with monitor(model := network(renorm.BatchRenorm2d(4, limits=renorm.Limits.constant(100, 100))), every=1) as watch:
        train(model)
    assert watch.compute()["gap/1"] == 0


def test_one_forward_in_so_many_is_measured_and_numbers_are_since_the_last_call() -> None:
    model = network(nn.BatchNorm2d(4))
    watch = monitor(model, every=3)
    train(model, 2)
    assert watch.compute() == {}
    train(model, 1)
    assert len(watch.compute()) == 9
    assert watch.compute() == {}
    model.eval()
    train(model, 3)
    assert watch.compute() == {}
    watch.close()
    train(model.train(), 3)
    assert watch.compute() == {}


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_a_recomputation_is_not_measured_again(reentrant: bool) -> None:
    def forward(x: Tensor) -> Any:
        return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    found = []
    for way in (None, forward):
        torch.manual_seed(0)
        model = network(renorm.BatchRenorm2d(4, limits=LIMITS))
        with monitor(model, every=1) as watch:
            train(model, forward=way)
        found.append(watch.compute())
    assert found[0] == found[1]


def test_what_normalizes_by_running_statistics_or_is_empty_is_not_measured() -> None:
    model = network(renorm.BatchRenorm2d(4, limits=LIMITS))
    with monitor(model, every=1) as watch:
        with renorm.freeze(model, statistics="running"):
            model(torch.randn(2, 4, 5, 5))
        model[1](torch.randn(0, 4, 5, 5))
        model[1](torch.full((2, 4, 5, 5), torch.nan))
    assert watch.compute() == {}


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        monitor(nn.BatchNorm1d(3), every=0)
    with pytest.raises(ValueError, match="no norm layer"):
        monitor(nn.Linear(3, 3))


def test_numbers_go_into_torchmetrics_and_tensorboard(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    mean, values = torchmetrics.MeanMetric(), []
    model = network(renorm.BatchRenorm2d(4, limits=LIMITS))
    with monitor(model, every=1) as watch, tensorboard.SummaryWriter(tmp_path) as writer:
        for step in range(3):
            train(model, 1)
            for name, value in watch.compute().items():
                writer.add_scalar(name, value, step)
                if name.startswith("gap/"):
                    mean.update(value)
                    values.append(value)
    assert float(mean.compute()) == pytest.approx(sum(values) / 3)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("gap/1")] == pytest.approx(values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_for_it() -> None:
    model = network(renorm.BatchRenorm2d(4, limits=renorm.Limits(1.2, 0.1, 0, 10, 10))).cuda()
    x = torch.randn(7, 4, 5, 5, device="cuda")
    model(x)
    with monitor(model, every=1) as watch:
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert watch.compute()
