"""convert(policies=...): layers of any class, by a function of one's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import renorm
from renorm import ConversionReport, convert

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"


class Theirs(nn.Module):
    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(features))
        self.register_buffer("ra_mean", torch.randn(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * (x - self.ra_mean)


def ours(old: Theirs) -> renorm.Norm:
    new = renorm.BatchRenorm1d(len(old.gain), bias=False)
    new.weight, new.running_mean = old.gain, old.ra_mean
    return new


def test_a_policy_makes_the_layer_and_mode_and_hooks_are_added() -> None:
    calls: list[str] = []
    reports: list[ConversionReport] = []
    model = nn.Sequential(Theirs(), nn.BatchNorm1d(4))
    gain = model[0].gain
    model[0].eval()
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    convert(model, renorm.BatchRenorm, policies={Theirs: ours}, report=reports.append)
    assert [type(layer) for layer in model] == [renorm.BatchRenorm1d] * 2
    assert model[0].weight is gain
    assert (model[0].training, model[1].training) == (False, True)
    model(torch.randn(5, 4))
    assert calls == ["hook"]
    assert "0: Theirs -> BatchRenorm1d" in str(reports[0])


def test_a_shared_layer_stays_shared_and_is_made_once() -> None:
    shared = Theirs()
    made: list[nn.Module] = []
    model = nn.Sequential(shared, nn.Linear(4, 4), shared)
    convert(model, renorm.BatchRenorm, policies={Theirs: lambda old: made.append(old) or ours(old)})
    assert model[0] is model[2]
    assert made == [shared]


def test_a_policy_may_leave_a_layer_with_all_that_is_in_it_without_a_warning() -> None:
    model = nn.Sequential(Theirs(), nn.ModuleList([nn.BatchNorm1d(4)]), nn.BatchNorm1d(4))
    convert(model, renorm.BatchRenorm, policies={Theirs: lambda old: None, nn.ModuleList: lambda old: None})
    assert type(model[0]) is Theirs
    assert type(model[1][0]) is nn.BatchNorm1d
    assert type(model[2]) is renorm.BatchRenorm1d


def test_a_policy_goes_before_what_convert_does_itself_and_takes_the_exact_class() -> None:
    class Sub(nn.BatchNorm1d):
        pass

    model = nn.Sequential(nn.BatchNorm1d(4), Sub(4))
    policies: Any = {nn.BatchNorm1d: lambda old: renorm.BatchNorm1d(4, momentum=0.5)}
    with pytest.warns(UserWarning, match="1: Sub left as it is"):
        convert(model, renorm.BatchRenorm, policies=policies)
    assert (type(model[0]), model[0].momentum) == (renorm.BatchNorm1d, 0.5)


@pytest.mark.parametrize("made", [nn.Identity(), nn.BatchNorm1d(4), 3], ids=str)
def test_a_policy_that_returns_something_else_is_refused_and_nothing_changes(made: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), Theirs())
    message = f"policies must return a layer of renorm or None, got {type(made).__name__} for Theirs at '1'"
    with pytest.raises(TypeError, match=message):
        convert(model, renorm.BatchRenorm, policies={Theirs: lambda old: made})
    assert type(model[0]) is nn.BatchNorm1d


def policies_of_the_page() -> dict[str, Any]:
    (block,) = (
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "def from_sb3" in code
    )
    names: dict[str, Any] = {"renorm": renorm, "torch": torch, "nn": nn}
    exec(block, names)
    return names


def sb3_contrib() -> tuple[Any, dict[str, Any]]:
    return pytest.importorskip("sb3_contrib.common.torch_layers").BatchRenorm1d, {"warmup_steps": 50}


def torchrl() -> tuple[Any, dict[str, Any]]:
    return pytest.importorskip("torchrl.modules").BatchRenorm1d, {"warmup_steps": 50}


LIBRARIES = pytest.mark.parametrize(("library", "function"), [(sb3_contrib, "from_sb3"), (torchrl, "from_torchrl")])


@LIBRARIES
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_batch_renorm_of_reinforcement_learning_goes_on_by_the_page_s_policies(library: Any, function: str) -> None:
    cls, options = library()
    theirs = cls(4, **options)
    for _ in range(60):
        theirs(torch.randn(32, 4) * 2 + 1)
    x = torch.randn(32, 4) * 2 + 1
    expected = theirs.eval()(x)
    model = nn.Sequential(nn.Linear(4, 4), theirs)
    parameters = {id(parameter) for parameter in model.parameters()}
    convert(model, renorm.BatchRenorm, policies={cls: policies_of_the_page()[function]})
    assert {id(parameter) for parameter in model.parameters()} == parameters
    torch.testing.assert_close(model[1](x), expected)
    assert model[1].num_batches_tracked == 60
    assert (model[1].limits.at(49), model[1].limits.at(60)) == ((1.0, 0.0), (3.0, 5.0))


@LIBRARIES
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_without_a_policy_they_are_named(library: Any, function: str) -> None:
    cls, options = library()
    model = nn.Sequential(nn.Linear(4, 4), cls(4, **options), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match=r"policies=\{cls: function\} replaces others\):\n  1: BatchRenorm1d left"):
        convert(model, renorm.BatchRenorm)
