"""What inspect reports: against the data themselves, in every mode, with nothing of the model changed."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import renorm

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "nn.BatchNorm": nn.BatchNorm2d,
    "nn.SyncBatchNorm": nn.SyncBatchNorm,
    "batch norm": renorm.BatchNorm2d,
    "batch renorm": lambda c: renorm.BatchRenorm2d(c, limits=renorm.Limits.constant(1.5, 0.5)),
    "ghost": lambda c: renorm.GhostBatchNorm2d(c, 2),
    "batch-group": lambda c: renorm.BatchGroupNorm2d(c, 2),
    "example weight": lambda c: renorm.BatchNorm2d(c, example_weight=0.3),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def network(make: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), make(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), make(4), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    for _ in range(20):
        model(torch.randn(8, 3, 6, 6) * 2 + 1)
    return model


def batches(sizes: tuple[int, ...] = (6, 4, 7)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 6, 6, generator=generator) * (i + 1) + i, torch.randint(3, (size,), generator=generator))
        for i, size in enumerate(sizes)
    ]


def groups_of(layer: Any, x: Tensor) -> list[Tensor]:
    """Statistics groups of an input: (examples, channels, positions) of each channel group, in float64."""
    size = getattr(layer, "examples_per_group", None) or len(x)
    ends = list(range(size, len(x) + 1, size)) or [len(x)]
    if ends[-1] < len(x):
        ends = [*ends, len(x)] if len(x) - ends[-1] > 1 else [*ends[:-1], len(x)]
    k = getattr(layer, "channels_per_group", 1)
    starts = [0, *ends[:-1]]
    return [
        part
        for start, end in zip(starts, ends, strict=True)
        for part in x[start:end].double().flatten(2).unflatten(1, (-1, k)).unbind(1)
    ]


@every_layer
def test_corrections_and_ranges_are_those_of_the_first_layer_s_input(make: Callable[[int], nn.Module]) -> None:
    model, data = network(make), batches()
    layer: Any = model[1]
    r, d, reach, elements = [], [], 0.0, []
    k = getattr(layer, "channels_per_group", 1)
    mu, variance = layer.running_mean.double().unflatten(0, (-1, k)), layer.running_var.double().unflatten(0, (-1, k))
    mu, variance = mu.mean(1), variance.mean(1) + (mu - mu.mean(1, keepdim=True)).square().mean(1)
    sigma = (variance + layer.eps).sqrt()
    with torch.no_grad():
        for x, _ in data:
            for i, group in enumerate(groups_of(layer, model[0](x))):
                c = i % len(mu)
                deviation = (group.var(unbiased=False) + layer.eps).sqrt()
                r.append(float(deviation / sigma[c]))
                d.append(float((group.mean() - mu[c]) / sigma[c]))
                reach = max(reach, float(((group - group.mean()) / deviation).abs().max()))
                elements.append(group.numel())
    found = renorm.inspect(model, data).layers[0]
    assert found.r == pytest.approx(quantiles(r, 0.05, 0.5, 0.95), rel=1e-4)
    assert found.d == pytest.approx(quantiles(d, 0.05, 0.5, 0.95), rel=1e-4, abs=1e-5)
    assert found.d_size == pytest.approx(quantiles(map(abs, d), 0.5, 0.95), rel=1e-4)
    assert found.clipped_r == pytest.approx(share(r, lambda v: v > found.r_max or v < 1 / found.r_max))
    assert found.clipped_d == pytest.approx(share(d, lambda v: abs(v) > found.d_max))
    assert found.range_training == pytest.approx(reach, rel=1e-4)
    assert found.bound == pytest.approx(math.sqrt(max(elements) - 1))
    assert found.range_training <= found.bound
    assert found.batches == len(elements) // len(mu)


@every_layer
def test_the_gap_is_what_the_first_layer_s_output_differs_by_in_both_modes(make: Callable[[int], nn.Module]) -> None:
    model = network(make)
    layer: Any = model[1]
    layer.example_weight = 0.0
    data = batches((6, 6, 6))
    squares = []
    with torch.no_grad():
        for x, _ in data:
            y = model[0](x)
            trained, evaluated = copy.deepcopy(layer).train()(y), copy.deepcopy(layer).eval()(y)
            squares.append((trained - evaluated).square().mean())
    found = renorm.inspect(model, data).layers[0]
    assert found.gap == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-4)


def quantiles(values: Any, *at: float) -> tuple[float, ...]:
    ordered = sorted(values)
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in at)


def share(values: list[float], chosen: Callable[[float], bool]) -> float:
    return sum(map(chosen, values)) / len(values)


@every_layer
def test_the_range_at_evaluation_is_that_of_the_output_without_gamma_and_beta(make: Callable[[int], nn.Module]) -> None:
    model, data = network(make).eval(), batches()
    with torch.no_grad():
        reach = max(float(model[1](model[0](x)).abs().max()) for x, _ in data)
    assert renorm.inspect(model, data).layers[0].range_evaluation == pytest.approx(reach, rel=1e-4)


@every_layer
def test_scores_are_those_of_both_modes(make: Callable[[int], nn.Module]) -> None:
    model, data = network(make), batches()
    modes = renorm.inspect(model, data).modes
    expected = {}
    for training in (False, True):
        judged = copy.deepcopy(model).eval()
        right, loss, count = 0.0, 0.0, 0
        for x, y in data:
            by_batch = copy.deepcopy(judged)
            for i in (1, 5):
                by_batch[i].train(training)
            with torch.no_grad():
                output = by_batch(x)
            right += float((output.argmax(1) == y).sum())
            loss += float(nn.functional.cross_entropy(output, y, reduction="sum"))
            count += len(x)
        expected[training] = (right / count, loss / count)
    for mode, place in zip(modes, (0, 1), strict=True):
        assert mode.metric == ("accuracy", "cross_entropy")[place]
        assert mode.evaluation.mean == pytest.approx(expected[False][place], abs=1e-5)
        assert mode.training.mean == pytest.approx(expected[True][place], abs=1e-5)
        sign = 1 if mode.higher_is_better else -1
        assert mode.gap.mean == pytest.approx(sign * (mode.training.mean - mode.evaluation.mean))


@every_layer
def test_nothing_of_the_model_changes(make: Callable[[int], nn.Module]) -> None:
    model = network(make)
    model[3].eval()
    before = copy.deepcopy(model)
    renorm.inspect(model, batches())
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for old, new in zip(before.modules(), model.modules(), strict=True):
        assert old.training == new.training
        assert not new._forward_hooks
        assert not new._forward_pre_hooks


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 5, 6, 6), "channels"), ((1, 3, 1, 1), "one element per channel at layer 1, .* drop_last=True")],
    ids=["every mode", "training alone"],
)
def test_an_error_leaves_the_model_as_it_was(shape: tuple[int, ...], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = copy.deepcopy(model)
    with pytest.raises((RuntimeError, ValueError), match=message):
        renorm.inspect(model, [*batches(), (torch.randn(shape), torch.zeros(shape[0]).long())])
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model[1].training
    assert not model[1]._forward_pre_hooks
    assert not model[1]._forward_hooks


def means_of(spread_between: float, examples: int = 16) -> list[Tensor]:
    """Batches of examples with a level each: of its own, and of its batch."""
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(1, 4, generator=generator) * spread_between + torch.randn(examples, 4, generator=generator)
        for _ in range(200)
    ]


@pytest.mark.parametrize(("spread_between", "expected"), [(0.0, 1.0), (1.0, 17.0), (3.0, 145.0)])
def test_dependence_is_1_for_independent_examples_and_grows_with_what_batches_share(
    spread_between: float, expected: float
) -> None:
    layer = nn.BatchNorm1d(4)
    data = means_of(spread_between)
    renorm.estimate(layer, data)
    found = renorm.inspect(nn.Sequential(layer), data).layers[0]
    # of random effects: E[between] / E[within] = 1 + n * ratio of the variances
    assert found.between_within == pytest.approx(expected, rel=0.15)


def test_statistics_of_other_data_are_told_from_noise() -> None:
    layer = nn.BatchNorm1d(4)
    renorm.estimate(layer, means_of(0.0))
    same = renorm.inspect(nn.Sequential(layer), means_of(0.0)).layers[0]
    other = renorm.inspect(nn.Sequential(layer), [2 * x + 1 for x in means_of(0.0)]).layers[0]
    assert same.shift < 0.05
    assert same.scale == pytest.approx(1, abs=0.05)
    assert other.shift == pytest.approx(1, abs=0.1)
    assert other.scale == pytest.approx(2, abs=0.1)


def test_dead_channels_are_counted() -> None:
    layer = nn.BatchNorm2d(6)
    layer.weight.data = torch.tensor([1.0, 0.0, 1.0, 5e-3, 1.0, -1e-4])
    x = torch.randn(32, 6, 4, 4)
    x[:, 4] = 2.0  # an input that never varies
    renorm.estimate(layer, [x])
    found = renorm.inspect(nn.Sequential(layer), x.split(8)).layers[0]
    assert (found.dead, found.nearly_dead) == (3, 1)


def test_channels_that_an_activation_keeps_at_0_are_dead() -> None:
    layer = renorm.BatchNorm2d(2, act="relu")
    layer.bias.data = torch.tensor([0.0, -100.0])
    assert renorm.inspect(nn.Sequential(layer), torch.randn(32, 2, 4, 4).split(8)).layers[0].dead == 1


def test_padding_does_not_count() -> None:
    model = renorm.BatchRenorm1d(3)
    data = [torch.randn(6, 3, 5) * (i + 1) for i in range(4)]
    long = [torch.cat([x, torch.full((6, 3, 2), 1e6)], 2) for x in data]
    mask = torch.arange(7) < 5

    def masked(model: nn.Module, x: Tensor) -> Tensor:
        return model(x, mask=mask)

    expected = renorm.inspect(model, data, None, loss=None)
    assert renorm.inspect(model, long, None, loss=None, forward=masked).layers[0].r == expected.layers[0].r
    found = renorm.inspect(model, long, None, loss=None, forward=masked).layers[0]
    for name in ("d", "between_within", "range_training", "range_evaluation", "bound"):
        assert getattr(found, name) == pytest.approx(getattr(expected.layers[0], name), rel=1e-5), name


def test_what_a_network_reads_from_its_batches_is_lost_in_shuffled_ones() -> None:
    """Batches of one class, and an input that tells the class only by how far the example is from its batch's mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 2))
    model[1].weight.data, model[1].bias.data = torch.tensor([[-1.0], [1.0]]), torch.zeros(2)
    data = []
    for _ in range(40):
        y = torch.randint(2, (16,))
        data.append((y[:, None] + 100 * torch.randn(1, 1) + 0.1 * torch.randn(16, 1), y))
    renorm.estimate(model, [x for x, _ in data])
    mode = renorm.inspect(model, data).modes[0]
    assert mode.training.mean > 0.9
    assert mode.shuffled is not None
    assert mode.shuffled.mean < 0.7
    assert mode.composition is not None
    assert mode.composition.low > 0.2


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Named(dict[str, Any]):
    """Batches as tokenizers make them."""


KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named tuple": Pair,
    "mapping": lambda x, y: {"x": x, "labels": y},
    "its subclass": lambda x, y: Named(x=x, labels=y),
}


@pytest.mark.parametrize("batch", KINDS.values(), ids=KINDS)
def test_batches_of_any_kind_are_shuffled_with_their_targets(batch: Callable[[Tensor, Tensor], Any]) -> None:
    seen = []

    def forward(model: nn.Module, batch: Any) -> Any:
        seen.append(type(batch))
        return model(batch["x"] if isinstance(batch, dict) else batch[0])

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            return x

    x = torch.randn(64, 2)
    data = [batch(a, a.argmax(1)) for a in x.split([16, 16, 30, 2])]
    mode = renorm.inspect(Given(), data, forward=forward).modes[0]
    assert mode.shuffled is not None
    assert mode.shuffled.mean == 1
    assert set(seen) == {type(data[0])}


@pytest.mark.parametrize("number", [2, 32, 33, 64, 65])
def test_no_batch_is_left_out_of_the_shuffling(number: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    mode = renorm.inspect(model, [(torch.randn(3, 2), torch.zeros(3).long())] * number).modes[0]
    assert mode.composition is not None


def test_batches_that_cannot_be_joined_are_not_shuffled() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = [(torch.randn(4, 3, size, size), torch.zeros(4).long()) for size in (6, 8, 7)]
    mode = renorm.inspect(model, data).modes[0]
    assert mode.shuffled is None
    assert mode.composition is None


def test_without_targets_only_layers_are_looked_at() -> None:
    found = renorm.inspect(network(nn.BatchNorm2d), [x for x, _ in batches()])
    assert found.modes == ()
    assert len(found.layers) == 2


def test_a_torchmetrics_metric_scores_the_modes() -> None:
    model, data = network(nn.BatchNorm2d), batches()
    by_metric = renorm.inspect(model, data, MulticlassAccuracy(3, average="micro"), loss=None).modes[0]
    by_name = renorm.inspect(model, data, loss=None).modes[0]
    assert by_metric.metric == "MulticlassAccuracy"
    assert by_metric.training.mean == pytest.approx(by_name.training.mean)
    assert by_metric.evaluation.mean == pytest.approx(by_name.evaluation.mean)


def test_layers_of_timm_are_seen() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=4)
    data = [(torch.randn(4, 3, 32, 32), torch.randint(4, (4,))) for _ in range(2)]
    found = renorm.inspect(model, data)
    assert [layer.name for layer in found.layers] == [
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    ]
    assert all(layer.batches == 2 for layer in found.layers)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_is_looked_at_as_it_is_uncompiled() -> None:
    model, data = network(nn.BatchNorm2d), batches()
    compiled = torch.compile(model, backend="eager")
    compiled(data[0][0])
    frames = torch._dynamo.utils.counters["frames"]["total"]
    found, expected = renorm.inspect(compiled, data), renorm.inspect(model, data)
    assert [layer.r for layer in found.layers] == [layer.r for layer in expected.layers]
    assert found.modes == expected.modes
    assert torch._dynamo.utils.counters["frames"]["total"] == frames  # nothing was compiled for it


def test_a_layer_that_no_batch_reaches_is_told() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Identity())
    model[1].spare = nn.BatchNorm1d(3)
    found = renorm.inspect(model, torch.randn(8, 3).split(4))
    assert found.layers[1].batches == 0
    assert any(str(finding) == "1.spare: no batch reached it" for finding in found.findings)


def test_plain_phases_of_limits_are_told() -> None:
    model = nn.Sequential(renorm.BatchRenorm1d(3))
    model(torch.randn(8, 3))
    found = renorm.inspect(model, torch.randn(8, 3).split(4))
    assert found.layers[0].plain_until == 5_000
    assert any("is plain batch norm until step 5000, and at 1 now" in str(finding) for finding in found.findings)


def test_limits_are_at_work_from_the_step_after_their_start() -> None:
    layer = renorm.BatchRenorm1d(3, limits=renorm.Limits.over(1_000))
    found = []
    for steps in (38, 39):
        layer.num_batches_tracked.fill_(steps)
        found.append(renorm.inspect(nn.Sequential(layer), torch.randn(8, 3).split(4)).layers[0])
    assert [(report.plain_until, report.corrected) for report in found] == [(38, False), (None, True)]


def test_a_network_that_returns_a_dictionary_is_inspected_by_the_forward_that_the_error_names() -> None:
    segmentation = pytest.importorskip("torchvision").models.segmentation
    model = segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    scenes = [(torch.randn(2, 3, 32, 32), torch.randint(3, (2, 32, 32))) for _ in range(2)]
    with pytest.raises(TypeError, match=r"accuracy is of a tensor, and the model returns .* with \['out'\]") as caught:
        renorm.inspect(model, scenes)
    (code,) = re.findall(r"as forward=(lambda .*)", str(caught.value))
    found = renorm.inspect(model, scenes, forward=eval(code))
    assert [mode.metric for mode in found.modes] == ["accuracy", "cross_entropy"]
    assert renorm.inspect(model, scenes, None, loss=None).layers[0].r == found.layers[0].r


@pytest.mark.parametrize(
    ("model", "loader", "options", "message"),
    [
        (nn.Linear(3, 3), [torch.randn(4, 3)], {}, "no norm layer with running statistics"),
        (nn.BatchNorm1d(3), [], {}, "loader has no batch"),
        (nn.BatchNorm1d(3), [torch.randn(4, 3)], {"metric": "f1"}, "metric must be one of"),
    ],
)
def test_what_cannot_be_inspected_is_refused(
    model: nn.Module, loader: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        renorm.inspect(model, loader, **options)
