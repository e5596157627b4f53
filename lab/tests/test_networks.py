"""Networks and the layers in them: as a run says, of our own and of timm and torchvision."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import renorm
from renorm_lab.data import Dataset, Part
from renorm_lab.data.dataset import assemble
from renorm_lab.networks.methods import limits, norm_factory
from renorm_lab.networks.models import build_model, resnet, resnet18
from renorm_lab.networks.network import make_network
from renorm_lab.networks.variants import VARIANTS
from renorm_lab.runs import Run
from renorm_lab.training.optimizers import make_average, make_optimizer, make_schedule
from renorm_lab.training.pretraining import prepare

from .test_parts import run


def layers(model: nn.Module) -> list[renorm.Norm]:
    return [module for module in model.modules() if isinstance(module, renorm.Norm)]


@pytest.fixture
def images() -> Dataset:
    labels = torch.arange(60) % 6
    pixels = (40 * labels[:, None, None, None] + torch.randint(20, (60, 3, 16, 16))).to(torch.uint8)
    part = Part(pixels, labels)
    return assemble(part, part, part, "images")


def network(images: Dataset, **changes) -> nn.Module:
    return make_network(run(**{"model": "resnet8"} | changes), images)


def test_method_is_a_setting_of_norm():
    layer = norm_factory(run(limits=True, tracking="std", examples_per_group=4, channels_per_group=8))(64)
    assert layer.limits == renorm.Limits(3.0, 5.0, start=50, r_end=400, d_end=250)
    assert (layer.examples_per_group, layer.channels_per_group, layer.tracking) == (4, 8, "std")
    assert layer.momentum == 0.05


def test_ramps_are_multiples_of_the_papers():
    assert limits(run()) == renorm.Limits.over(1_300)
    assert limits(run(plain_phase=2.0, ramps=0.5, r_max=2.0)) == renorm.Limits(
        2.0, 5.0, start=100, r_end=275, d_end=200
    )
    assert limits(run(plain_phase=0.0, ramps=0.0)).at(0) == (3.0, 5.0)


@pytest.mark.parametrize(
    ("name", "norms"), [("mlp", 4), ("resnet8", 7), ("plain8", 7), ("resnet20", 19), ("resnet18", 20)]
)
def test_model_normalizes_by_the_given_layer(name: str, norms: int):
    model = build_model(name, (3, 16, 16), 7, partial(renorm.Norm, momentum=0.3))
    assert [layer.momentum for layer in layers(model)] == [0.3] * norms
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def test_resnets_have_the_size_of_the_papers():
    assert sum(parameter.numel() for parameter in resnet(20, 3, 10, renorm.Norm).parameters()) == 269_722
    assert {layer.num_features for layer in layers(resnet18(3, 100, renorm.Norm))} == {64, 128, 256, 512}


def test_plain_network_has_no_shortcut():
    x = torch.randn(2, 3, 16, 16)
    plain, residual = resnet(8, 3, 5, renorm.Norm, shortcuts=False).eval(), resnet(8, 3, 5, renorm.Norm).eval()
    residual.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(x), residual(x))
    for model, names in ((plain, {"norm, not decayed", "gamma", "beta", "not norm"}), (residual, {"gamma", "beta"})):
        groups = renorm.optim.param_groups(model, 0.1)
        assert {group["name"] for group in groups} >= names
    exposed = [len(group["params"]) for model in (plain, residual)
               for group in renorm.optim.param_groups(model, 0.1) if group["name"] == "gamma"]  # fmt: skip
    assert exposed[0] == 1 < exposed[1]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet9", (3, 8, 8), "depth must be 8, 14, 20"),
        ("resnet", (3, 8, 8), "model must be mlp, resnet18"),
        ("vgg8", (3, 8, 8), "model must be mlp, resnet18"),
        ("timm/nothing", (3, 32, 32), "timm/nothing: Unknown model"),
        ("timm/vit_tiny_patch16_224", (3, 224, 224), "must have batch norm layers"),
        ("torchvision/nothing", (3, 32, 32), "Unknown model nothing"),
        ("torchvision/resnet18", (1, 32, 32), "takes colour images, got 1 channels"),
        ("keras/resnet18", (3, 32, 32), "model must be timm/NAME or torchvision/NAME"),
    ],
)
def test_model_that_does_not_exist_is_refused(name: str, shape: tuple[int, int, int], message: str):
    with pytest.raises(ValueError, match=message):
        build_model(name, shape, 10, partial(renorm.Norm))


@pytest.mark.parametrize("name", ["resnet8", "torchvision/resnet18"])
def test_pretrained_weights_are_timms(name: str, images: Dataset):
    with pytest.raises(ValueError, match=f"model must be timm/NAME, got {name}"):
        network(images, model=name, pretrained=True)


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/test_efficientnet", "torchvision/resnet18"])
def test_networks_of_libraries_get_the_runs_layers(name: str, images: Dataset):
    model = network(images, model=name, limits=True, tracking="std", channels_per_group=8, examples_per_group=2)
    assert len(layers(model)) > 3
    assert all(isinstance(module, renorm.Norm) for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    for layer in layers(model):
        assert (layer.momentum, layer.channels_per_group, layer.examples_per_group) == (0.05, 8, 2)
        assert layer.limits == renorm.Limits.over(1_300)
    assert model(torch.randn(4, 3, 64, 64)).shape == (4, 6)


def test_gamma_can_stay_one(images: Dataset):
    model = network(images, train_gamma=False)
    optimizer = make_optimizer(model, run(weight_decay=0.1))
    model(torch.randn(8, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    for layer in layers(model):
        assert torch.equal(layer.weight, torch.ones_like(layer.weight))
        assert layer.bias.abs().max() > 0


@pytest.mark.parametrize(("which", "number"), [("none", 0), ("all", 7), ("followed", 3), ("exposed", 4)])
def test_layers_are_unclipped_by_their_place(which: str, number: int, images: Dataset):
    model = network(images, limits=True, tracking="std", unclipped=which)
    unclipped = [layer for layer in layers(model) if layer.limits.r_max == torch.inf]
    assert len(unclipped) == number
    assert all(layer.limits.start == 50 for layer in unclipped)


def test_unknown_settings_are_refused(images: Dataset):
    with pytest.raises(ValueError, match="unclipped must be none, all, followed or exposed, got some"):
        network(images, limits=True, unclipped="some")
    with pytest.raises(ValueError, match=r"variant must be one of noisy statistics, .* got louder"):
        network(images, variant="louder")
    with pytest.raises(ValueError, match="optimizer must be sgd or rmsprop, got adam"):
        make_optimizer(network(images), run(optimizer="adam"))
    with pytest.raises(ValueError, match="schedule must be cosine or exponential, got linear"):
        make_schedule(make_optimizer(network(images), run()), run(schedule="linear"), 3)


def group_norm(**changes) -> Run:
    changed = {"tracking": "total", "examples_per_group": 1, "channels_per_group": 4, "example_weight": 1.0} | changes
    return run(steps=30, **changed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_otherwise_and_end_as_group_norm(variant: str):
    layer, plain = norm_factory(group_norm(variant=variant))(16), norm_factory(group_norm())(16)
    x = torch.randn(6, 16, 16, 16) + torch.arange(16)[:, None, None]
    differs = False
    for _ in range(30):
        differs |= not torch.allclose(layer(x), plain(x), atol=1e-4)
    assert differs
    for other, own in zip(plain.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(own, other)
    for each in (layer, plain):
        each.eval().example_weight = 1.0
    expected = plain(x)
    if variant == "even groups":
        expected = nn.functional.group_norm(x, 2)  # 8 channels of 16 x 16
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_variants_refuse_a_mask():
    layer = norm_factory(group_norm(variant="random groups"))(16)
    with pytest.raises(AssertionError, match="no mask"):
        layer(torch.randn(6, 16, 4, 4), torch.ones(6, 4, 4, dtype=torch.bool))


def test_even_groups_have_as_many_elements_everywhere():
    layer = norm_factory(group_norm(variant="even groups"))(64)
    assert [layer.channels(torch.empty(1, 64, size, size)) for size in (32, 16, 8, 4)] == [2, 8, 32, 64]


def test_number_of_groups_changes_by_thirds():
    for variant, sizes in (("growing groups", [2, 4, 8]), ("shrinking groups", [32, 16, 8])):
        layer = norm_factory(group_norm(variant=variant, channels_per_group=8))(64)
        x, seen = torch.randn(2, 64, 4, 4), []
        for _ in range(30):
            seen.append(layer.channels(x))
            layer(x)
        assert seen == [size for size in sizes for _ in range(10)]


def test_noise_has_the_size_of_the_statistics():
    layer = norm_factory(group_norm(variant="noisy statistics"))(16)
    x = 5 * torch.randn(2_000, 16, 8, 8)
    for _ in range(200):
        layer(x[:8])
    means = layer(x).detach().unflatten(1, (4, 4)).mean((2, 3, 4))
    assert float(means.std()) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(("decay", "gamma"), [("none", 2.0), ("all", 2 - 0.02), ("one", 2 - 0.01), ("auto", 2 - 0.02)])
def test_gamma_decays_as_the_run_says(decay: str, gamma: float, images: Dataset):
    model = network(images)
    settings = run(weight_decay=0.1, lr=0.1, norm_decay=decay)
    optimizer = make_optimizer(model, settings)
    last = layers(model)[-1].weight
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        last.fill_(2.0)
    optimizer.step()
    torch.testing.assert_close(last, torch.full_like(last, gamma))


def test_without_decay_the_optimizer_is_plain_sgd(images: Dataset):
    optimizer = make_optimizer(network(images), run())
    assert type(optimizer) is torch.optim.SGD
    assert [(group["weight_decay"], group["momentum"]) for group in optimizer.param_groups] == [(0, 0.9)]


def test_exponential_schedule_falls_every_two_epochs(images: Dataset):
    settings = run(optimizer="rmsprop", schedule="exponential", lr=1.0)
    optimizer = make_optimizer(network(images), settings)
    schedule = make_schedule(optimizer, settings, epoch_steps=3)
    rates = []
    for _ in range(13):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0] * 6 + [0.94] * 6 + [0.94**2])


def test_average_has_weights_and_statistics(images: Dataset):
    model = network(images)
    assert make_average(model, run()) is None
    average = make_average(model, run(average=0.75))
    average.update_parameters(model)  # the first one copies
    with torch.no_grad():
        model[1].weight.fill_(3.0)
        model[1].running_mean.fill_(8.0)
    average.update_parameters(model)
    torch.testing.assert_close(average.module[1].weight, torch.full((16,), 1.5))
    torch.testing.assert_close(average.module[1].running_mean, torch.full((16,), 2.0))


def test_pretraining_gives_all_weights_but_the_last(images: Dataset):
    other = Part(images.train.images[:20], images.train.labels[:20] % 2)
    images = replace(images, pretraining=other)
    settings = run(model="resnet8", pretraining_steps=5, limits=True, tracking="std", batch_size=8)
    model = make_network(settings, images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model, settings, images, lambda: None)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {"8.weight", "8.bias"}
    assert all(int(layer.num_batches_tracked) == 5 for layer in layers(model))


def test_nothing_is_pretrained_unless_the_run_says_so(images: Dataset):
    model = network(images)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model, run(), images, lambda: None)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
