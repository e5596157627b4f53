"""The version is written in one place; what must repeat it agrees."""

from __future__ import annotations

import pytest

import renorm

from .building import ROOT


def test_the_citation_names_this_version() -> None:
    assert f"version: {renorm.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()


def test_the_lab_has_this_version() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "lab" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == renorm.__version__
