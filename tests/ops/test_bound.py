"""Launches through Triton's own launchers, over a driver that does nothing: how many there are, and what fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from stub import driver

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver that works"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stub")
    driver.build(folder)
    run = driver.run(Path(__file__).with_name("bound_launches.py"), folder)
    assert run.returncode == 0, run.stderr[-2000:]
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("limits", ["constant", "ramp"])
@pytest.mark.parametrize(("kind", "number"), [("small", 3), ("large", 6)])
def test_a_second_step_is_bound_and_a_ramp_adds_no_launch(
    found: dict[str, Any], kind: str, number: int, limits: str
) -> None:
    first, second = found[f"{kind}, {limits}"]
    assert first == {"first": number}
    assert second == {"__call__": number}


def test_what_lies_elsewhere_is_compiled_anew(found: dict[str, Any]) -> None:
    aligned, other = found["aligned, then not"]
    assert aligned.keys() == {"first"}
    assert "first" in other


def test_what_cannot_be_launched_warns_once_and_goes_by_torch(found: dict[str, Any]) -> None:
    outcome = found["without a compiler"]
    [message] = outcome["warnings"]
    assert "torch's own kernels" in message
    assert "Failed to find C compiler" in message
    assert outcome["steps"] == 2
    assert outcome["goes on"] is False
    assert max(outcome["error"], outcome["again"]) < 1e-5


def test_the_hosts_share_can_be_measured(tmp_path: Path) -> None:
    driver.build(tmp_path)
    run = driver.run(Path(__file__).with_name("host_cost.py"), tmp_path, "1")
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["direction"] for row in rows} == {"forward", "both"}
    assert {row["layer"] for row in rows} >= {"nn.BatchNorm2d", "BatchRenorm2d"}


def test_backends_are_torchs_own_until_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from renorm.ops import backends

    monkeypatch.delenv("RENORM_GPU", raising=False)
    assert not backends._wants_triton()
    monkeypatch.setenv("RENORM_GPU", "triton")
    assert backends._wants_triton()
