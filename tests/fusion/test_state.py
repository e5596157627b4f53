"""Copies, parameters, checkpoints, reports and compilation of a fused model."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import renorm
from fusion.helpers import LIMITS, Configured, batch, converted, fused, reasons, step
from renorm import ConversionReport, convert, to_batchnorm
from renorm_lab.networks.models import build_model


def small() -> nn.Module:
    """A residual network, in double precision."""
    return build_model("resnet8", (3, 8, 8), 5, nn.BatchNorm2d).double()


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_is_fused_and_computes_the_same(copied: Any) -> None:
    model = convert(
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Tanh()).double(), renorm.BatchRenorm,
        limits=LIMITS, fuse=True,
    )  # fmt: skip
    reference, other = to_batchnorm(copy.deepcopy(model)), copied(model)
    assert type(other) is type(model)
    assert (other[1].weight is model[1].weight) == (copied is copy.copy)
    x = batch()
    expected = reference.eval()(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(nn.ReLU, "forward")  # fused, it is not called
        assert torch.equal(other.eval()(x), expected)
        other.train()(x)
    assert other[1].num_batches_tracked == 1


def test_parameters_and_layers_are_those_of_the_unfused_conversion() -> None:
    model = small()
    parameters, keys = [id(parameter) for parameter in model.parameters()], list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    convert(model, renorm.BatchRenorm, fuse=True)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert list(model.state_dict()) == keys
    for module, before in zip(model.modules(), classes, strict=True):
        assert isinstance(module, (before, renorm.Norm))


def test_a_fused_model_trains_with_an_optimizer_made_before() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert(model, renorm.BatchRenorm, limits=LIMITS, fuse=True)
    x, target = batch(8, 3, 8, 8), torch.arange(8) % 5
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_signature_of_the_forward_is_kept() -> None:
    assert list(inspect.signature(fused(Configured()).forward).parameters) == ["x", "extra"]


def test_back_to_batch_norm_undoes_the_fusion() -> None:
    model = small()
    text, keys = repr(model), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    convert(model, renorm.BatchNorm, fuse=True)
    step(model, (batch(4, 3, 8, 8),))
    x = batch(4, 3, 8, 8)
    expected = model.eval()(x)
    plain = to_batchnorm(model)
    assert [type(module) for module in plain.modules()] == classes
    assert repr(plain) == text
    assert list(plain.state_dict()) == keys
    assert not any("fused" in name for module in plain.modules() for name in vars(module))
    torch.testing.assert_close(plain(x), expected)


def test_a_refusal_to_go_back_leaves_the_fusion() -> None:
    model = convert(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()), renorm.BatchRenorm, fuse=True, example_weight=0.5)
    kind = type(model)
    with pytest.raises(ValueError, match=r"0: example_weight=0\.5"):
        to_batchnorm(model)
    assert type(model) is kind


def test_converting_in_two_parts_fuses_both() -> None:
    model, x = small(), batch(4, 3, 8, 8)
    expected = converted(model)[0](x)
    reports: list[ConversionReport] = []
    for where in (r"^[13]\b", r"^[45]\b"):
        convert(model, renorm.BatchRenorm, where=where, limits=LIMITS, fuse=True, report=reports.append)
        torch.manual_seed(0)
        if where == r"^[13]\b":
            assert torch.isfinite(model.eval()(x)).all()
            model.train()
    assert [len(report.fused) for report in reports] == [3, 7]
    torch.testing.assert_close(model(x), expected)


def test_without_fuse_nothing_changes_but_the_layers() -> None:
    model = small()
    classes = [type(module) for module in model.modules() if not isinstance(module, nn.BatchNorm2d)]
    reports: list[ConversionReport] = []
    convert(model, renorm.BatchRenorm, report=reports.append)
    assert [type(module) for module in model.modules() if not isinstance(module, renorm.Norm)] == classes
    assert reports[0].fused == reports[0].not_fused == ()
    assert str(reports[0]).startswith("7 layers replaced, 0 passed over\n")


def test_a_lone_layer_has_nothing_to_fuse() -> None:
    with pytest.warns(UserWarning, match="found nothing to fuse"):
        layer = convert(nn.BatchNorm2d(4), renorm.BatchRenorm, fuse=True)
    assert type(layer) is renorm.BatchRenorm2d


@pytest.mark.parametrize("reason", ["its class's", "copied or pickled", "takes", "no subclasses"])
def test_modules_with_ways_of_their_own_run_as_they_are_written(reason: str) -> None:
    class Own(nn.Sequential):
        if reason == "no subclasses":

            def __init_subclass__(cls) -> None:
                raise TypeError(reason)

        if reason == "copied or pickled":

            def __deepcopy__(self, memo: Any) -> Own:
                return self

        if reason == "takes":

            def forward(self, *args: Tensor) -> Any:
                return super().forward(*args)

    model = Own(nn.BatchNorm2d(6), nn.ReLU()).double()
    if reason == "its class's":
        forward = model.forward
        model.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    reports: list[ConversionReport] = []
    with pytest.warns(UserWarning, match="found nothing to fuse"):
        convert(model, renorm.BatchRenorm, fuse=True, report=reports.append)
    assert type(model) is Own
    assert reason in reasons(reports[0])["0"]
    assert model(batch()).shape == (4, 6, 5, 5)


def test_the_report_says_what_is_fused_and_what_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    convert(small(), renorm.BatchRenorm, fuse=True, report=print)
    text = capsys.readouterr().out
    assert text.startswith("7 layers replaced, 0 passed over, 7 calls fused, 0 not\n")
    assert "\n  3.norm1: fused with relu\n  3.norm2: fused with the residual add and relu\n" in text


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer, of Function
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_a_fused_model_compiles_without_graph_breaks() -> None:
    model, eager = fused(small()), fused(small())
    eager.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch(4, 3, 8, 8)
    for either in (eager, compiled):
        either(x).logsumexp(1).sum().backward()
    for expected, actual in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))
