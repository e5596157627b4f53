"""What looks at operations from outside: torch.func's transforms, forward-mode AD, tracing, the compiler."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import renorm
from renorm.transforms import snapshot

LIMITS = renorm.Limits(r_max=1.5, d_max=0.5, start=1, r_end=4, d_end=3)
LAYERS: dict[str, Any] = {
    "batch norm": lambda: renorm.BatchNorm1d(4),
    "batch renorm": lambda: renorm.BatchRenorm1d(4, limits=LIMITS, momentum=0.1),
    "cumulative": lambda: renorm.BatchNorm1d(4, momentum=None, tracking="total"),
    "ghost": lambda: renorm.GhostBatchNorm1d(4, 3),
    "groups of channels": lambda: renorm.BatchGroupNorm1d(4, 2, limits=LIMITS),
    "activation": lambda: renorm.BatchNorm1d(4, act="silu", affine=False),
    "no statistics": lambda: renorm.BatchNorm1d(4, track_running_stats=False),
    "nn.BatchNorm1d": lambda: nn.BatchNorm1d(4),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def critic(make: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(4, 1))


def run(model: nn.Module, state: tuple[Any, Any], x: Tensor) -> Any:
    return functional_call(model, state, (x,))


@each_layer
@pytest.mark.parametrize("graph", [True, False], ids=["with gradients", "without"])
def test_an_ensemble_trains_under_vmap_as_one_by_one(make: Any, graph: bool) -> None:
    torch.manual_seed(0)
    models = [critic(make) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def loss(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return run(base, (parameters, buffers), x).square().mean()

    for _ in range(3):
        x = torch.randn(8, 3) * 2 + 1
        with torch.set_grad_enabled(graph):
            together = vmap(loss, (0, 0, None))(parameters, buffers, x)
            alone = [model(x).square().mean() for model in models]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
    for name, buffer in buffers.items():
        expected = torch.stack([model.get_buffer(name) for model in models])
        torch.testing.assert_close(buffer, expected, rtol=1e-4, atol=1e-5)
    gradients = vmap(grad(loss), (0, 0, None))(parameters, buffers, x)
    for i, model in enumerate(models):
        model.zero_grad()
        model(x).square().mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][i], parameter.grad, rtol=1e-3, atol=1e-5)
        for name, buffer in model.named_buffers():  # which move under grad, too
            torch.testing.assert_close(buffers[name][i], buffer, rtol=1e-4, atol=1e-5)


def test_members_stay_as_they_are_in_a_block_around_vmap() -> None:
    models = [critic(LAYERS["batch renorm"]) for _ in range(3)]
    state = stack_module_state(models)
    base, x = copy.deepcopy(models[0]).to("meta"), torch.randn(8, 3)
    for statistics in ("batch", "running"):
        with renorm.freeze(base, statistics=statistics):
            vmap(run, (None, (0, 0), None))(base, state, x)
    assert state[1]["1.num_batches_tracked"].tolist() == [0] * 3
    assert state[1]["1.running_mean"].count_nonzero() == 0


@pytest.mark.parametrize("transform", [lambda f: vmap(f, (None, 0)), grad], ids=["vmap", "grad"])
def test_a_block_that_a_transform_has_not_outlasted_is_refused(transform: Any) -> None:
    layer = renorm.BatchNorm(3)
    parameters = dict(layer.named_parameters())

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return run(layer, (parameters, {}), x).square().sum()

    with (
        pytest.raises(RuntimeError, match=r"accumulate cannot merge batches of a torch\.func transform that has ended"),
        renorm.accumulate(layer),
    ):
        transform(loss)(parameters, torch.randn(2, 3, 3))
    assert layer.num_batches_tracked == 0
    assert not layer.blocks


def test_a_block_inside_a_model_s_forward_works_under_vmap() -> None:
    layers = [renorm.BatchRenormGRU(3, 2, limits=LIMITS, momentum=0.1) for _ in range(2)]
    state, x = stack_module_state(layers), torch.randn(5, 4, 3)
    together = vmap(run, (None, (0, 0), None))(copy.deepcopy(layers[0]).to("meta"), state, x)[0]
    torch.testing.assert_close(together, torch.stack([layer(x)[0] for layer in layers]))
    for name, buffer in state[1].items():
        torch.testing.assert_close(buffer, torch.stack([layer.get_buffer(name) for layer in layers]))


@each_layer
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # torch's own rules are scripted
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_forward_mode_and_backward_mode_have_the_same_derivatives(make: Any, training: bool) -> None:
    layer = make().double()
    for _ in range(2):
        layer(torch.randn(8, 4).double())
    layer.train(training)
    x, direction, dy = torch.randn(3, 8, 4).double()
    state = copy.deepcopy(layer.state_dict())

    def fresh() -> Any:
        layer.load_state_dict(state)
        return layer

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(fresh()(forward_ad.make_dual(x, direction))).tangent
    with renorm.freeze(fresh(), statistics="batch") if isinstance(layer, renorm.Norm) else nullcontext(layer.eval()):
        _, by_func = jvp(layer, (x,), (direction,))  # whose buffers, being no inputs, must not move
    layer.train(training)
    backward = torch.autograd.grad(fresh()(x.requires_grad_()), x, dy)[0]
    torch.testing.assert_close((tangent * dy).sum(), (direction * backward).sum())
    if isinstance(layer, renorm.Norm) or not training:
        torch.testing.assert_close(by_func, tangent)


@each_layer
def test_training_mode_can_be_traced(make: Any) -> None:
    layer = make()
    for _ in range(2):
        layer(torch.randn(8, 4))
    expected = copy.deepcopy(layer)
    x, another = torch.randn(2, 8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit as a whole
        traced = torch.jit.trace(layer, x, check_trace=False)  # which runs the layer once
    expected(x)
    torch.testing.assert_close(traced(another), expected(another), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(traced.named_buffers()), dict(expected.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tensor", [torch.ones(3), torch.tensor(7), torch.ones(4).double()], ids=["float", "step", "double"]
)
def test_the_operation_passes_torchs_own_check(tensor: Tensor) -> None:
    torch.library.opcheck(torch.ops.renorm.snapshot.default, (tensor,))


def test_eager_code_gets_the_buffer_itself() -> None:
    buffer = torch.randn(3)
    assert snapshot(buffer) is buffer
