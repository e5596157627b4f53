"""Building where there is no torch or no compiler leaves a library that works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_WITHOUT_TORCH = "import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    if not (_ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(_ROOT / name, tmp_path)
    for name in ("csrc", "src"):
        shutil.copytree(
            _ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        )
    return tmp_path


@pytest.mark.parametrize(
    ("command", "environment", "reason"),
    [
        (["-c", _WITHOUT_TORCH, "build"], {}, "torch is not in the build environment"),
        (["setup.py", "build"], {"CXX": "false", "CC": "false"}, "they could not be built"),
    ],
    ids=["without torch", "without a compiler"],
)
def test_building_goes_on_without_kernels_and_says_so_in_a_line(
    source: Path, command: list[str], environment: dict[str, str], reason: str
) -> None:
    run = subprocess.run(
        [sys.executable, *command], cwd=source, env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("renorm: ")]
    assert len(lines) == 1
    assert reason in lines[0]
    assert (source / "build").is_dir()
    built = [path.name for path in (source / "build").rglob("*") if path.is_file()]
    assert "norm.py" in built
    assert not any(name.startswith("_kernels") for name in built)
