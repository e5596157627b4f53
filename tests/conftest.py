"""What all tests share: one thread, a fixed seed, and Hypothesis without a clock."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
from hypothesis import settings

from renorm.ops import backends

torch.set_num_threads(1)  # the suite runs in parallel processes; and one long sum is the worst case for accuracy

settings.register_profile("default", deadline=None, derandomize=True, database=None, max_examples=60)
settings.register_profile("thorough", deadline=None, database=None, max_examples=2_000)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile without anything left from other tests."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=["kernels", "torch"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything once with the C++ kernels, and once as it is where they were not built."""
    if request.param == "kernels" and not backends.available["cpu"]:
        pytest.skip("the C++ kernels are not built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.available, "cpu", request.param == "kernels")
        yield request.param


@pytest.fixture
def kernels() -> None:
    """For tests of the C++ kernels themselves."""
    if not backends.available["cpu"]:
        pytest.skip("the C++ kernels are not built")
