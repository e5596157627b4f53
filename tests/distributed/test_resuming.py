"""A worker dies: the restarted training ends as an undisturbed one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

NEVER = -1


def run(checkpoint: Path, dies_at: int, sync: str) -> dict[str, Any]:
    script = Path(__file__).with_name("resuming.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*torchrun, str(script), str(checkpoint), str(dies_at), sync]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("failed (exitcode" in done.stderr) == (dies_at != NEVER), done.stderr[-3000:]
    found: dict[str, Any] = torch.load(checkpoint)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["running", "batch"])
def test_a_restarted_training_ends_as_an_undisturbed_one(sync: str, tmp_path: Path) -> None:
    disturbed = run(tmp_path / "disturbed.pt", 5, sync)
    undisturbed = run(tmp_path / "undisturbed.pt", NEVER, sync)
    assert disturbed["step"] == undisturbed["step"] == 8
    for name, tensor in undisturbed["model"].items():
        assert torch.equal(disturbed["model"][name], tensor), name
    assert undisturbed["model"]["1.num_batches_tracked"] == 8
