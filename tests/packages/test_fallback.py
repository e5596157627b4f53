"""Building where there is no torch, none that is new enough, or no compiler leaves a library that works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from .building import build, copy_source, put_in_place_of_torch


@pytest.mark.parametrize("lacking", ["torch", "a newer torch", "a compiler"])
def test_building_goes_on_without_kernels_and_says_so_in_a_line(lacking: str, tmp_path: Path) -> None:
    without = {
        "torch": lambda: put_in_place_of_torch(tmp_path),
        "a newer torch": lambda: put_in_place_of_torch(tmp_path, "__version__ = '2.9.1+cpu'\n"),
        "a compiler": lambda: {"CXX": "false", "CC": "false"},
    }
    reason = {
        "torch": "torch is not in the build environment",
        "a newer torch": "they need torch 2.10 or newer, and the build environment has 2.9.1+cpu",
        "a compiler": "they could not be built",
    }
    source = copy_source(tmp_path / "source")
    printed = build(source, tmp_path / "dist", "--wheel", **without[lacking]())
    lines = {line for line in printed.splitlines() if line.startswith("renorm: ")}
    assert len(lines) == 1
    assert reason[lacking] in lines.pop()
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with ZipFile(wheel) as archive:
        (tags,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: true" in archive.read(tags).decode()
        assert "renorm/norm.py" in archive.namelist()
        assert not any("_kernels" in name for name in archive.namelist())


def test_a_setuptools_that_is_too_old_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text("__version__ = '76.1.0'\ndef setup(): ...\n")
    source = copy_source(tmp_path / "source")
    run = subprocess.run(
        [sys.executable, "setup.py"], cwd=source, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr == 'renorm: setuptools 76.1.0 is too old to build it: pip install "setuptools>=77"\n'
