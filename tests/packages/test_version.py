"""The version is written in one place; what must repeat it agrees."""

from __future__ import annotations

import renorm

from .building import ROOT


def test_the_citation_names_this_version() -> None:
    assert f"version: {renorm.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
