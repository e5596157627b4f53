"""Devices without kernels of their own take plain torch: here meta tensors, which have shapes alone.

And the device that torch makes tensors on by default is for those of the user: ours say where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import renorm
from renorm.ops import dispatch, schema
from renorm.samplers import ClassBatchSampler, MicrobatchSampler, RandomBatchSampler
from renorm.selftest import selftest
from renorm.workers import sums


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 5), (6, 8, 4, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"examples_per_group": 2}, {"channels_per_group": 4}, {"act": "silu"}])
@pytest.mark.parametrize("limits", [None, renorm.Limits(), renorm.Limits.constant()])
@pytest.mark.parametrize("masked", [False, True])
def test_training_and_evaluation_on_meta(
    shape: tuple[int, ...], options: dict[str, Any], limits: Any, masked: bool
) -> None:
    layer = renorm.Norm(8, limits=limits, device="meta", **options)
    x = torch.empty(shape, device="meta", requires_grad=True)
    mask = torch.empty(shape[:1] + shape[2:], dtype=torch.bool, device="meta") if masked else None
    y = layer(x, mask=mask)
    y.sum().backward()
    assert y.shape == x.shape
    assert y.is_meta
    assert x.grad is not None
    assert x.grad.shape == x.shape
    layer.eval()
    layer.example_weight = 0.1
    assert layer(x).shape == x.shape


Batches = list[tuple[Tensor, Tensor]]
LABELS = [0, 1, 2, 3] * 4


def _layer(limits: renorm.Limits | None, **options: Any) -> Any:
    layer = renorm.Norm(4, limits=limits, device="cpu", **options)
    x = torch.randn(8, 4, device="cpu")
    layer(x).sum().backward()
    return layer.running_mean.tolist(), layer.eval()(x).tolist()


def _accumulated() -> Any:
    layer = renorm.BatchRenorm1d(4, limits=renorm.Limits.constant(), device="cpu")
    with renorm.accumulate(layer):
        for size in (8, 6):
            layer(torch.randn(size, 4, device="cpu"))
    return layer.running_mean.tolist()


def _recurrent(packed: bool) -> Any:
    lstm = renorm.BatchRenormLSTM(3, 4, device="cpu")
    x = torch.randn(5, 2, 3, device="cpu")
    if not packed:
        return lstm(x)[0].tolist()
    return lstm(pack_padded_sequence(x, torch.tensor([5, 3], device="cpu")))[0].data.tolist()


def _converted(model: nn.Module) -> Any:
    ours = renorm.convert(model, renorm.BatchRenorm, limits=renorm.Limits.over(10), fuse=True)
    return [tensor.tolist() for copy in (ours, renorm.to_batchnorm(ours)) for tensor in copy.state_dict().values()]


def _translated() -> Any:
    arrays = {"moving_mean": [1.0, 2.0], "moving_variance": [3.0, 4.0]}
    state = renorm.translate_state_dict(arrays, nn.BatchNorm1d(2, device="cpu"), steps=7)
    return {name: tensor.tolist() for name, tensor in state.items()}


def _decayed() -> Any:
    model = nn.Sequential(nn.Linear(2, 2, device="cpu"), nn.BatchNorm1d(2, device="cpu"))
    groups = renorm.optim.param_groups(model, weight_decay=0.5, toward=1)
    optimizer = renorm.optim.decay_toward_one(torch.optim.SGD(groups, lr=0.1))
    gamma: Any = model[1].weight
    gamma.grad = torch.ones(2, device="cpu")
    optimizer.step()
    return gamma.tolist()


# What makes tensors of its own, by what it does, of a model and batches that are there.
WORK: dict[str, Callable[[nn.Module, Batches], Any]] = {
    "constant limits": lambda *_: _layer(renorm.Limits.constant(1.5, 0.5)),
    "moving limits": lambda *_: _layer(renorm.Limits(start=0, r_end=9, d_end=7)),
    "groups": lambda *_: _layer(None, examples_per_group=3, channels_per_group=2),
    "accumulate": lambda *_: _accumulated(),
    "recurrent": lambda *_: _recurrent(packed=False),
    "packed": lambda *_: _recurrent(packed=True),
    "estimate": lambda model, batches: renorm.estimate(model, batches)[1].running_var.tolist(),
    "weigh": lambda model, batches: str(renorm.weigh(model, batches)),
    "inspect": lambda model, batches: str(renorm.inspect(model, batches)),
    "convert": lambda model, _: _converted(model),
    "translate_state_dict": lambda *_: _translated(),
    "decay_toward_one": lambda *_: _decayed(),
    "RandomBatchSampler": lambda *_: list(RandomBatchSampler(9, 4)),
    "ClassBatchSampler": lambda *_: list(ClassBatchSampler(LABELS, 2, 2)),
    "its classes with replacement": lambda *_: list(ClassBatchSampler(LABELS, 2, 2, replacement=True)),
    "MicrobatchSampler": lambda *_: list(MicrobatchSampler(RandomBatchSampler(9, 4), 2)),
    "selftest": lambda *_: str(selftest("cpu")),
}


def _model_and_batches() -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    return model, [(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(3)]


def _forget_constants() -> None:
    schema._constant.cache_clear()
    sums._known_places.cache_clear()
    dispatch._kinds.clear()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_a_default_device_is_for_the_tensors_of_the_user(work: Callable[[nn.Module, Batches], Any]) -> None:
    _forget_constants()
    model, batches = _model_and_batches()
    with torch.device("meta"):
        found = work(model, batches)
    assert work(*_model_and_batches()) == found


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("context", [FakeTensorMode, torch.inference_mode], ids=["fake", "inference"])
def test_what_is_kept_for_all_is_nobodys(context: Callable[[], Any]) -> None:
    """Constants that are first made where torch makes other tensors than plain ones."""
    _forget_constants()
    with context():
        schema._constant(1.5)
        sums._places((sums.Summed(4, "var", 1, 1e-5),), torch.device("cpu"))
    kept = [schema._constant(1.5), *sums._places((sums.Summed(4, "var", 1, 1e-5),), torch.device("cpu"))]
    assert all(type(tensor) is Tensor and tensor.is_cpu and not tensor.is_inference() for tensor in kept)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("case", ["in a block", "evaluation", "example weight", "activation and residual"])
def test_mkldnn_goes_everywhere_as_dense_tensors_do(case: str) -> None:
    layer = renorm.BatchNorm2d(3, act="relu" if "activation" in case else None)
    layer.example_weight = 0.3 if "weight" in case else 0.0
    layer.train(case == "in a block")
    layer.frozen = "batch" if case == "in a block" else None
    x = torch.randn(4, 3, 5, 2)
    residual = torch.randn(4, 3, 5, 2) if "residual" in case else None
    with torch.no_grad():
        y = layer(x.to_mkldnn(), residual=None if residual is None else residual.to_mkldnn())
        assert y.layout == torch._mkldnn  # type: ignore[attr-defined]
        torch.testing.assert_close(y.to_dense(), layer(x, residual=residual))
