"""Building this project as a stranger does, from a copy of its files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_MADE = {"build", "data", "dist", "runs"}  # in the folders of the two projects, by whoever works there


def copy_source(target: Path) -> Path:
    """The project's files, without what was built from them; skips the test where only the package is."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    anywhere = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so")

    def left_behind(folder: str, names: list[str]) -> set[str]:
        return anywhere(folder, names) | (_MADE if Path(folder) in (ROOT, ROOT / "lab") else set())

    return shutil.copytree(ROOT, target, ignore=left_behind)


def put_in_place_of_torch(folder: Path, code: str = "raise ImportError('hidden')\n") -> dict[str, str]:
    """Environment variables of a build that finds another torch; by default none, as an isolated one does."""
    (folder / "torch.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def build(source: Path, target: Path, *options: str, **environment: str) -> str:
    """Build what the options ask for, and give what was printed."""
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(target), str(source)]
    run = subprocess.run(
        command, env=os.environ | {"MAX_JOBS": "1"} | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    return run.stdout
