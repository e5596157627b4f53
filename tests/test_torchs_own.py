"""The inputs and checks of torch's own tests of batch norm modules, with our classes in place of torch's."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm

pytest.importorskip("expecttest", reason="torch's tests need expecttest")

with pytest.MonkeyPatch.context() as patched:  # importing them seeds and sets what torch's own runner needs
    patched.delenv("PYTORCH_TEST_WITH_SLOW", raising=False)
    from torch.testing._internal.common_modules import module_db

PAIRS: dict[type[nn.Module], list[type[renorm.Norm]]] = {
    nn.BatchNorm1d: [renorm.BatchNorm1d, renorm.BatchRenorm1d],
    nn.BatchNorm2d: [renorm.BatchNorm2d, renorm.BatchRenorm2d],
    nn.BatchNorm3d: [renorm.BatchNorm3d, renorm.BatchRenorm3d],
}
INFOS = {info.module_cls: info for info in module_db if info.module_cls in PAIRS}


class Case:
    """One of torch's inputs for one of our classes."""

    def __init__(self, ours: type[renorm.Norm], theirs: type[nn.Module], given: Any, training: bool) -> None:
        self.arguments, self.named = given.constructor_input.args, given.constructor_input.kwargs
        self.ours, self.theirs, self.training = ours, theirs, training
        (self.x,) = given.forward_input.args

    def pair(self) -> tuple[Any, Any]:
        theirs = self.theirs(*self.arguments, **self.named)
        layer = self.make()
        for parameter, own in zip(theirs.parameters(), layer.parameters(), strict=True):
            own.detach().copy_(nn.init.normal_(parameter).detach())
        layer.momentum = theirs.momentum
        return layer.train(self.training), theirs.train(self.training)

    def make(self, **options: Any) -> Any:
        if issubclass(self.ours, renorm.BatchRenorm):  # without its correction it is batch norm, to be compared
            options = {"limits": None, "tracking": "var"} | options
        return self.ours(*self.arguments, **self.named, **options)


def cases() -> Iterator[Any]:
    for theirs, classes in PAIRS.items():
        for ours in classes:
            for training in (True, False):
                given = INFOS[theirs].module_inputs_func(
                    INFOS[theirs], device="cpu", dtype=torch.float64, requires_grad=False, training=training
                )
                for i, one in enumerate(given):
                    mode = "training" if training else "evaluation"
                    name = f"{ours.__name__}-{one.desc or i}-{mode}"
                    yield pytest.param(Case(ours, theirs, one, training), id=name)


each_case = pytest.mark.parametrize("case", list(cases()))


@each_case
def test_outputs_gradients_and_buffers_are_torchs(case: Case) -> None:
    layers = [layer.double() for layer in case.pair()]
    inputs = [case.x.clone().requires_grad_() for _ in layers]
    outputs = [layer(input=x) for layer, x in zip(layers, inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(*([p.grad for p in layer.parameters()] for layer in layers))
    if case.x.numel() == 0 and layers[1].training:
        layers[1].num_batches_tracked.zero_()  # torch counts a batch of nothing
    torch.testing.assert_close(*(dict(layer.state_dict()) for layer in layers))


@each_case
def test_device_and_dtype_are_those_given(case: Case) -> None:
    for dtype in (torch.float64, torch.float16):
        layer = case.make(device="meta", dtype=dtype)
        assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
        assert all(parameter.dtype == dtype for parameter in layer.parameters())


@each_case
def test_pickles_and_copies_compute_the_same(case: Case) -> None:
    layer = case.pair()[0].double()
    layer(case.x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(layer)):
        torch.testing.assert_close(other(case.x), copy.deepcopy(layer)(case.x))


@each_case
def test_what_is_not_contiguous_is_the_same(case: Case) -> None:
    layer = case.pair()[0].double()
    wide = torch.stack((case.x, torch.zeros_like(case.x)), -1)
    formats = [wide[..., 0]]
    if case.x.ndim in (4, 5):
        layout = torch.channels_last if case.x.ndim == 4 else torch.channels_last_3d
        formats.append(case.x.contiguous(memory_format=layout))
    for x in formats:
        torch.testing.assert_close(copy.deepcopy(layer)(x), copy.deepcopy(layer)(case.x))


@each_case
def test_first_and_second_derivatives_are_right(case: Case) -> None:
    layer = case.pair()[0].double()
    layer.momentum = 0.0  # a function of its input alone
    parameters = tuple(layer.parameters())

    def output(x: Tensor, *_: Tensor) -> Tensor:
        return layer(x)

    inputs = (case.x.clone().requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("eps", [-1.0, float("nan")])
@pytest.mark.parametrize("ours", [cls for classes in PAIRS.values() for cls in classes])
def test_a_negative_eps_is_refused(ours: type[renorm.Norm], eps: float) -> None:
    with pytest.raises(ValueError, match=f"eps must be a number of at least 0, got {eps}"):
        ours(10, eps=eps)
