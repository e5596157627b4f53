"""Running statistics re-estimated: against the data themselves, and everything else as it was."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import renorm

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "nn.BatchNorm": nn.BatchNorm2d,
    "var": renorm.BatchNorm2d,
    "total": lambda c: renorm.BatchNorm2d(c, tracking="total"),
    "std": lambda c: renorm.BatchRenorm2d(c, limits=renorm.Limits.constant()),
    "ghost": lambda c: renorm.GhostBatchNorm2d(c, 2),
    "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def batches(sizes: tuple[int, ...] = (6, 4, 7)) -> list[Tensor]:
    return [torch.randn(size, 3, 5, 5) * (i + 1) + i for i, size in enumerate(sizes)]


def expected(layer: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance by the layer's rule, in float64."""
    x = torch.cat(inputs).double().movedim(1, -1).flatten(0, -2)
    tracking = getattr(layer, "tracking", "var")
    if tracking == "std":
        sigmas = torch.stack([(part.double().var((0, 2, 3), unbiased=False) + layer.eps).sqrt() for part in inputs])
        weights = torch.tensor([len(part) for part in inputs]).double()
        sigma = (weights[:, None] * sigmas).sum(0) / weights.sum()
        return x.mean(0), sigma.square() - layer.eps
    return x.mean(0), x.var(0, unbiased=tracking == "var")


@every_layer
def test_statistics_are_those_of_the_data(make: Callable[[int], nn.Module]) -> None:
    layer = make(3)
    layer(torch.randn(4, 3, 5, 5) * 5)
    steps = layer.num_batches_tracked.clone()
    data = batches()
    assert renorm.estimate(layer, data) is layer
    mean, var = expected(layer, data)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=1e-5)
    assert layer.num_batches_tracked == steps


@every_layer
def test_later_layers_see_what_the_earlier_ones_normalize_by_the_batch(make: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(make(3), nn.Dropout(0.9), nn.Conv2d(3, 3, 3), make(3)).eval()
    data = batches()
    inputs = []
    model[3].register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    renorm.estimate(model, data)
    mean, var = expected(model[3], inputs)
    torch.testing.assert_close(model[3].running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[3].running_var.double(), var, rtol=1e-4, atol=1e-5)
    again = inputs.copy()
    inputs.clear()
    renorm.estimate(model, data)
    for one, other in zip(inputs, again, strict=True):
        assert torch.equal(one, other)  # no dropout, and no correction toward the statistics that are replaced


@every_layer
def test_a_later_layer_s_statistics_are_those_of_its_inputs_at_evaluation(make: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(make(3), nn.Conv2d(3, 3, 1), make(3))
    data = [torch.randn(8, 3, 5, 5) * 2 + 3 for _ in range(4)]
    renorm.estimate(model, data)
    with torch.no_grad():
        mean = torch.stack([model[:2].eval()(x).mean((0, 2, 3)) for x in data]).mean(0)
    torch.testing.assert_close(model[2].running_mean, mean, rtol=1e-2, atol=1e-2)


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_everything_else_is_as_it_was(make: Callable[[int], nn.Module], training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), make(3), nn.Dropout()).train(training)
    model[2].train(not training)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    momentum, limits = model[1].momentum, getattr(model[1], "limits", None)
    renorm.estimate(model, batches())
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, getattr(model[1], "limits", None)) == (momentum, limits)
    assert not model[1]._forward_pre_hooks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.endswith(("running_mean", "running_var")), name


@every_layer
def test_an_error_in_the_middle_changes_nothing(make: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(make(3))
    before, limits = copy.deepcopy(model.state_dict()), getattr(model[0], "limits", None)
    with pytest.raises((ValueError, RuntimeError), match=r"channel|num_features|elements"):
        renorm.estimate(model, [*batches(), torch.randn(4, 2, 5, 5)])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model[0].training
    assert not model[0]._forward_pre_hooks
    assert getattr(model[0], "limits", None) == limits
    assert getattr(model[0], "blocks", ()) == ()


@every_layer
def test_batches_that_are_not_finite_are_left_out(make: Callable[[int], nn.Module]) -> None:
    layer, data = make(3), batches()
    with pytest.warns(UserWarning, match="1 batches were left out"):
        renorm.estimate(layer, [*data, torch.full((2, 3, 5, 5), math.nan)])
    torch.testing.assert_close(layer.running_mean.double(), expected(layer, data)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "batch",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, "anything"],
        lambda x: {"input": x, "labels": torch.zeros(len(x))},
    ],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_batches_as_loaders_give_them(batch: Callable[[Tensor], Any]) -> None:
    model, data = nn.BatchNorm2d(3), batches()
    renorm.estimate(model, map(batch, data))
    torch.testing.assert_close(model.running_mean.double(), expected(model, data)[0], rtol=1e-5, atol=1e-5)


def test_a_forward_of_the_user_s_own() -> None:
    model = nn.BatchNorm2d(3)
    data = batches()
    renorm.estimate(model, [{"image": x} for x in data], forward=lambda model, batch: model(batch["image"]))
    torch.testing.assert_close(model.running_mean.double(), expected(model, data)[0], rtol=1e-5, atol=1e-5)


def test_a_detector_takes_a_list_of_images_by_the_forward_that_the_error_names() -> None:
    class Detector(nn.Sequential):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return [{"boxes": y} for y in super().forward(torch.stack(images))]

    model = Detector(nn.BatchNorm2d(3))
    data = batches()
    loader = [(list(x), [{}] * len(x)) for x in data]
    with pytest.raises(TypeError, match="a batch must be a tensor") as caught:
        renorm.estimate(model, loader)
    (code,) = re.findall(r"as forward=(lambda .*), got list", str(caught.value))
    renorm.estimate(model, loader, forward=eval(code))
    torch.testing.assert_close(model[0].running_mean.double(), expected(model[0], data)[0], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ValueError, match="no norm layer with running statistics"):
        renorm.estimate(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)), batches())
    with pytest.raises(ValueError, match="loader must give a batch with finite moments"):
        renorm.estimate(nn.BatchNorm2d(3), [])
    with pytest.raises(TypeError, match=r"a batch must be a tensor.*got int"):
        renorm.estimate(nn.BatchNorm2d(3), [3])


def test_frozen_statistics_are_not_estimated() -> None:
    model = nn.Sequential(renorm.BatchNorm2d(3), renorm.BatchRenorm2d(3))
    with renorm.freeze(model[1]), pytest.raises(ValueError, match=r"model must not be frozen.* of 1 as they"):
        renorm.estimate(model, batches())
    renorm.estimate(model, batches())


def test_batch_renorm_takes_single_elements_here_too() -> None:
    model = nn.Sequential(renorm.BatchRenorm1d(3), nn.Linear(3, 3), renorm.BatchRenorm1d(3))
    data = [torch.randn(size, 3) for size in (6, 4, 1)]
    renorm.estimate(model, data)
    torch.testing.assert_close(model[0].running_mean, torch.cat(data).mean(0), rtol=1e-5, atol=1e-5)


def test_a_subclass_that_is_called_by_name_and_keeps_no_count() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = Own(3)
            self.bn.num_batches_tracked = None

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x=x)

    model, data = Calls(), batches()
    renorm.estimate(model, data)
    torch.testing.assert_close(model.bn.running_mean.double(), expected(model.bn, data)[0], rtol=1e-5, atol=1e-5)
    assert renorm.inspect(model, data).layers[0].steps is None


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(3), renorm.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.warns(UserWarning, match="no finite batch reached unused"):
        model = renorm.estimate(Detour(), batches())
    assert torch.equal(model.unused.running_mean, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_half_and_double_precision(dtype: torch.dtype) -> None:
    plain, ours = nn.BatchNorm2d(3).to(dtype), renorm.BatchNorm2d(3).to(dtype)
    data = [x.to(dtype) for x in batches()]
    mean = expected(plain, data)[0]
    for layer in (plain, ours):
        renorm.estimate(layer, data)
        tolerance = 1e-2 if layer.running_mean.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=tolerance, atol=tolerance)


def test_a_real_network_agrees_with_torch_s_own_update() -> None:
    """update_bn averages the batches' variances; with one batch there is nothing to average."""
    model = timm.create_model("resnet10t", num_classes=3).train()
    reference, data = copy.deepcopy(model), [torch.randn(8, 3, 32, 32)]
    renorm.estimate(model, data)
    torch.optim.swa_utils.update_bn(data, reference)
    for (name, tensor), other in zip(model.named_buffers(), reference.buffers(), strict=True):
        if "num_batches" not in name:
            torch.testing.assert_close(
                tensor, other, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name} {text}"
            )


@pytest.mark.parametrize(("name", "value"), [("track_running_stats", False), ("momentum", 0.0), ("momentum", None)])
def test_settings_that_let_training_move_nothing_do_not_keep_it_from_estimating(name: str, value: Any) -> None:
    model = nn.Sequential(renorm.BatchRenorm1d(3))
    setattr(model[0], name, value)
    x = torch.randn(64, 3) + 2
    renorm.estimate(model, x.split(16))
    torch.testing.assert_close(model[0].running_mean, x.mean(0))
    assert getattr(model[0], name) == value
