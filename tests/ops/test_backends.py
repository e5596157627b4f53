"""What can compute, and how one more is added."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from renorm.activation import Activation, activate
from renorm.grouping import Grouping
from renorm.moments import Moments
from renorm.ops import aten, backends, kernels, reference, tracking
from renorm.ops.problem import Inputs, Running, RunningState, Settings
from renorm.ops.tracking import Rule


def test_a_backend_is_four_functions_and_is_asked_by_layers() -> None:
    script = Path(__file__).with_name("toy_backend.py")
    environment = os.environ | {"RENORM_CPU": "off", "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["evaluate", "normalize", "normalize_backward", "track"]


@pytest.mark.parametrize(
    ("x", "mask", "grouping", "expected"),
    [
        (torch.zeros(4, 3, 2), None, Grouping(), aten.CPU),
        (torch.zeros(4, 3, 2), None, Grouping(4), aten.CPU),
        (torch.zeros(4, 3, 2), None, Grouping(2), reference.DEFINITION),
        (torch.zeros(4, 3, 2), torch.ones(4, 2, dtype=torch.bool), Grouping(), reference.DEFINITION),
        (torch.zeros(4, 3, 2, dtype=torch.bfloat16), None, Grouping(), reference.DEFINITION),
        (torch.zeros(4, 2, 3).mT, None, Grouping(), aten.CPU),
        (torch.zeros(3, 4, 2).movedim(1, 0), None, Grouping(), reference.DEFINITION),
    ],
    ids=["a channel", "a channel in one group", "groups", "masked", "half precision", "channels last", "other strides"],
)
def test_torch_s_own_kernels_take_plain_batches_in_float32(
    x: torch.Tensor, mask: torch.Tensor | None, grouping: Grouping, expected: object
) -> None:
    assert backends.of_torch(Inputs(x, mask=mask), Settings(grouping, 1e-5)) is expected


def test_kernels_take_no_integers_and_no_subclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.available, "cpu", True)
    x = torch.zeros(4, 3)
    assert backends.take(x)
    assert not backends.take(x.long())
    assert not backends.take(x.as_subclass(type("Subclass", (torch.Tensor,), {})))
    assert not backends.take(torch.zeros(4, 3, device="meta"))


@pytest.mark.usefixtures("kernels")
def test_names_of_rules_and_activations_are_the_same_everywhere() -> None:
    assert tuple(tracking.RULES) == get_args(tracking.Tracking)
    state = RunningState(torch.zeros(2), torch.ones(2), torch.tensor(0), torch.tensor(0))
    moments, x = Moments(torch.zeros(1, 2), torch.ones(1, 2), torch.full((1, 1), 4.0)), torch.randn(4, 2)
    for name in tracking.RULES:
        kernels.track(state, moments, Rule(name, 0.1), Settings(Grouping(), 1e-5))
    for name in get_args(Activation):
        settings, running = Settings(Grouping(), 0.0, name), Running(torch.zeros(2), torch.ones(2))
        torch.testing.assert_close(kernels.evaluate(Inputs(x), settings, running, 0.0), activate(x, name))
    with pytest.raises(RuntimeError, match="tracking must be one of std, var, total, got mine"):
        kernels.track(state, moments, Rule("mine", 0.1), Settings(Grouping(), 1e-5))  # type: ignore[arg-type]


def test_triton_knows_every_rule_and_activation() -> None:
    pytest.importorskip("triton")
    from renorm.ops.triton.activation import CODES

    assert tuple(CODES) == (None, *get_args(Activation))


def test_kernels_of_another_version_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RENORM_CPU", raising=False)
    other = Path(pytest.importorskip("_ctypes").__file__)  # a library that has none of ours
    monkeypatch.setattr(backends, "library_files", lambda: [other])
    monkeypatch.setattr(backends, "has_stable_abi", lambda: True)
    with pytest.warns(UserWarning, match="do not load.*built from another version of renorm"):
        assert not backends._load_cpu_kernels()
