"""Processes that stay from test to test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .crew import Crew


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One of pytest-xdist's workers takes all tests of this folder, so that there is one crew of each size."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("distributed"))


def _crew(number: int) -> Iterator[Crew]:
    crew = Crew(number)
    yield crew
    crew.stop()


@pytest.fixture(scope="package")
def two() -> Iterator[Crew]:
    """Two processes."""
    yield from _crew(2)


@pytest.fixture(scope="package")
def four() -> Iterator[Crew]:
    """Four processes."""
    yield from _crew(4)


@pytest.fixture(scope="package", params=[2, 4], ids=["2 processes", "4 processes"])
def crew(request: pytest.FixtureRequest) -> Crew:
    """Two processes, then four."""
    found: Crew = request.getfixturevalue({2: "two", 4: "four"}[request.param])
    return found
