"""Modules around batch norms: replaced as a whole, passed over as a whole, or converted inside."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm
from renorm import ConversionReport, convert

UNCERTAIN = "it is not certain that it calls each batch norm in it once a forward"


class NormInChunks(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(part) for part in x.chunk(2)])


class NormTwice(NormInChunks):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class NormOfSettings(NormInChunks):
    parts = 3

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(x[i :: self.parts]) for i in range(self.parts)])


class NormInTraining(NormInChunks):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            a, b = x[::2], x[1::2]
            return torch.cat([self.inner(a), self.inner(b)])
        return self.inner(x)


class NormByShape(NormInChunks):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 4:
            x = self.inner(x[:4])
        return self.inner(x)


class NormOfSuperclass(NormInChunks):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:4]) if x.shape[0] > 4 else super().forward(x)


class NormInHelper(NormInChunks):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.part(x[i : i + 2]) for i in range(0, len(x), 2)])

    def part(self, x: Tensor) -> Tensor:
        return self.inner(x)


class SequentialNorm(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = super().forward(x)
        return x


class NormOfAFewBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])

    def forward(self, x: Tensor, domain: Any = 0) -> Tensor:
        return torch.cat([self.norms[len(part) % 2](part) for part in x.chunk(2)])


class NormUnderTwoNames(NormInChunks):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.inner(x) if len(x) > 2 else x)


WHOLE: dict[str, Any] = {
    "a loop over chunks": NormInChunks,
    "a layer called twice": NormTwice,
    "a loop that can be traced": NormOfSettings,
    "a training forward of its own": NormInTraining,
    "branches by shape": NormByShape,
    "calls of a superclass": NormOfSuperclass,
    "calls in a helper": NormInHelper,
    "a sequence of its own": lambda: SequentialNorm(nn.BatchNorm1d(4), nn.ReLU()),
    "a list": NormOfAFewBranches,
    "a layer under two names": NormUnderTwoNames,
    "in another": lambda: NormWithActivation(NormInChunks()),
}


class NormWithActivation(nn.Module):
    """Converted inside, unless what it holds is not."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


class BNReLU(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(4), nn.ReLU())


class NormOfAnyShape(NormInChunks):
    """As SpeechBrain's: what torch.fx cannot follow, and still one call."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if x.ndim == 3:
            x = x.reshape(-1, shape[-1])
        y = self.inner(x)
        return y.reshape(shape) if len(shape) == 3 else y

    def reset(self) -> None:
        self.inner.reset_parameters()


class NormList(nn.ModuleList):
    pass


class NormStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = NormList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ConvNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.bn(part) for part in self.conv(x).chunk(1)])


class Agent(nn.Module):
    """Keeps statistics of what it observes, and is no norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.running_mean) / self.running_var.sqrt())


INSIDE: dict[str, Any] = {
    "norm and activation": lambda: NormWithActivation(nn.BatchNorm1d(4)),
    "one in another": lambda: NormWithActivation(NormWithActivation(nn.BatchNorm1d(4))),
    "a sequence": BNReLU,
    "a forward that depends on shapes": NormOfAnyShape,
    "the same in another": lambda: NormWithActivation(NormOfAnyShape()),
    "a stack": NormStack,
    "a convolution and its norm": ConvNorm,
    "a model with statistics of its own": Agent,
    "a learned activation": lambda: NormWithActivation(nn.Sequential(nn.BatchNorm1d(4), nn.PReLU())),
}


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_what_may_call_a_layer_in_its_own_way_is_passed_over_whole(make: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), make())
    reports: list[ConversionReport] = []
    with pytest.warns(UserWarning, match=f"1: {type(model[1]).__name__} left as it is, {UNCERTAIN}"):
        convert(model, renorm.BatchRenorm, report=reports.append)
    assert [row.name for row in reports[0].replaced] == ["0"]
    assert [row.name for row in reports[0].passed_over] == ["1"]
    assert not any(isinstance(module, renorm.Norm) for module in model[1].modules())
    model(torch.randn(6, 4))


@pytest.mark.parametrize("make", INSIDE.values(), ids=INSIDE)
def test_what_calls_each_layer_once_is_converted_inside(make: Any) -> None:
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, renorm.BatchRenorm)
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert all(isinstance(layer, renorm.BatchRenorm1d) for layer in layers)
    model(torch.randn(6, 4))
    assert [int(layer.num_batches_tracked) for layer in layers] == [1] * len(layers)


def test_a_layer_that_is_also_inside_of_such_a_module_stays() -> None:
    inside = NormInChunks()
    model = nn.ModuleDict({"first": inside.inner, "then": inside})
    with pytest.warns(UserWarning, match="then: NormInChunks left"):
        convert(model, renorm.BatchRenorm)
    assert type(model["first"]) is nn.BatchNorm1d


def test_one_that_is_not_selected_is_left_without_a_word() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": NormInChunks()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, renorm.BatchRenorm, where="a")
    with pytest.warns(UserWarning, match="b: NormInChunks left"):
        convert(model, renorm.GhostBatchNorm, examples_per_group=2, where=lambda name, module: name == "b.inner")


def test_the_layers_in_an_unknown_subclass_stay_with_it() -> None:
    class Mine(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(4)
            self.auxiliary = nn.BatchNorm1d(4)

    model = nn.Sequential(Mine())
    with pytest.warns(UserWarning, match="passed over 1 layers") as caught:
        convert(model, renorm.BatchRenorm)
    assert "auxiliary" not in str(caught[0].message)
    assert type(model[0].auxiliary) is nn.BatchNorm1d


@pytest.mark.parametrize(
    "make",
    [
        lambda: type("BatchNormOfMine", (nn.Module,), {})(),
        lambda: type("MyBatchRenorm", (nn.Module,), {})(),
        lambda: Keeping("ra_mean"),
        lambda: Keeping("running_mean"),
    ],
)
def test_what_looks_like_batch_norm_is_named(make: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), make())
    with pytest.warns(UserWarning, match=f"1: {type(model[1]).__name__} left as it is, its class is not known"):
        convert(model, renorm.BatchRenorm)


class Keeping(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_buffer(name, torch.zeros(4))


# --- timm's split batch norm --------------------------------------------------------------------------------------


def test_timm_s_split_batch_norm_is_passed_over_whole_with_its_own_reason() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    model = timm_layers.convert_splitbn_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), num_splits=2)
    with pytest.warns(UserWarning, match="1: SplitBatchNorm2d left as it is, .*with its own weight and statistics"):
        convert(model, renorm.BatchRenorm)
    assert not any(isinstance(module, renorm.Norm) for module in model.modules())


# --- ghost batch norm of others -----------------------------------------------------------------------------------


class _GhostBatchNorm(nn.Module):
    """Composer's, in all that matters here; Composer itself needs an older torch."""

    def __init__(self, base_batchnorm: nn.Module, ghost_batch_size: int = 32) -> None:
        super().__init__()
        self.ghost_batch_size = ghost_batch_size
        self.batchnorm = base_batchnorm

    def forward(self, input: Tensor) -> Tensor:
        chunks = -(-input.shape[0] // self.ghost_batch_size)
        return torch.cat([self.batchnorm(chunk) for chunk in input.chunk(chunks)])


class GhostBatchNorm2d(_GhostBatchNorm):
    pass


def tabnet_s(features: int = 4, size: int = 4) -> nn.Module:
    layer: nn.Module = pytest.importorskip("pytorch_tabnet.tab_network").GBN(features, size, momentum=0.02)
    return layer


GHOSTS = pytest.mark.parametrize(
    ("make", "inner", "shape", "dimension"),
    [
        (tabnet_s, "bn", (12, 4), "1d"),
        (lambda: GhostBatchNorm2d(nn.BatchNorm2d(4), 4), "batchnorm", (12, 4, 3, 3), "2d"),
    ],
    ids=["TabNet", "Composer"],
)


@GHOSTS
@pytest.mark.parametrize(
    ("to", "options"),
    [
        (renorm.BatchNorm, {}),
        (renorm.BatchRenorm, {"limits": renorm.Limits.constant()}),
        (renorm.GhostBatchNorm, {}),
        (renorm.BatchGroupNorm, {"num_groups": 4}),
    ],
)
def test_ghost_batch_norm_becomes_one_layer_with_groups_of_its_size(
    make: Any, inner: str, shape: tuple[int, ...], dimension: str, to: Any, options: dict[str, Any]
) -> None:
    model = nn.Sequential(make())
    norm = getattr(model[0], inner)
    nn.init.normal_(norm.weight)
    norm.running_mean.normal_()
    x = torch.randn(shape)
    expected = model.eval()(x)
    kept = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    layer = convert(model, to, **options)[0]
    assert type(layer).__name__ == to.__name__ + dimension
    assert layer.examples_per_group == 4
    assert all(
        a is b for a, b in zip(kept, (layer.weight, layer.bias, layer.running_mean, layer.running_var), strict=True)
    )
    torch.testing.assert_close(model(x), expected)


@GHOSTS
def test_ghost_batch_norm_trains_as_before_where_ghost_batches_are_equal(
    make: Any, inner: str, shape: tuple[int, ...], dimension: str
) -> None:
    theirs = make()
    x = torch.randn(shape)
    expected = theirs(x)
    reports: list[ConversionReport] = []
    ours = convert(theirs, renorm.GhostBatchNorm, steps=0, report=reports.append)
    torch.testing.assert_close(ours(x), expected)
    assert ours.num_batches_tracked == 1  # where theirs has counted 3
    assert "ghost batches of 4" in str(reports[0])


def test_a_size_that_is_given_is_taken() -> None:
    layer = convert(tabnet_s(), renorm.GhostBatchNorm, examples_per_group=8)
    assert layer.examples_per_group == 8


def test_hooks_around_ghost_batch_norm_stay_and_one_inside_keeps_it() -> None:
    calls: list[Any] = []
    model = nn.Sequential(tabnet_s(), tabnet_s())
    model[0].register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    model[1].bn.register_forward_hook(lambda *_: calls.append("part"))
    with pytest.warns(UserWarning, match="1: GBN left as it is, there is a hook on bn, which sees parts of a batch"):
        convert(model, renorm.BatchRenorm)
    assert isinstance(model[0], renorm.BatchRenorm1d)
    model(torch.randn(8, 4))
    assert calls == [(8, 4), "part", "part"]


def test_a_ghost_batch_norm_of_another_dimension_than_the_target_is_passed_over_whole() -> None:
    with pytest.warns(UserWarning, match="0: GBN left as it is, BatchRenorm2d does not take 1d input"):
        model = convert(nn.Sequential(tabnet_s(), nn.BatchNorm2d(4)), renorm.BatchRenorm2d)
    assert type(model[0].bn) is nn.BatchNorm1d


def test_a_whole_tabnet_counts_a_batch_as_one_step() -> None:
    tab_network = pytest.importorskip("pytorch_tabnet.tab_network")
    group_matrix = torch.eye(6)
    model = tab_network.TabNet(6, 2, n_d=4, n_a=4, n_steps=2, virtual_batch_size=4, group_attention_matrix=group_matrix)
    x = torch.randn(32, 6)
    expected = model.eval()(x)[0]
    parameters = {id(parameter) for parameter in model.parameters()}
    convert(model, renorm.BatchRenorm, limits=renorm.Limits.over(100))
    assert not any(isinstance(module, tab_network.GBN) for module in model.modules())
    assert {id(parameter) for parameter in model.parameters()} == parameters
    torch.testing.assert_close(model(x)[0], expected)
    model.train()(x)[0].square().mean().backward()
    counts = [int(layer.num_batches_tracked) for layer in model.modules() if isinstance(layer, renorm.Norm)]
    assert set(counts) == {0, 1}  # the last step has layers that are never called
