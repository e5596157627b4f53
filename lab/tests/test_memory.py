"""A long job does not fill the memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch

from renorm_lab.jobs.memory import return_memory

_MEGABYTES = 8


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what was freed")
def test_what_a_run_has_freed_goes_back_to_the_system():
    return_memory()
    before = resident_megabytes()
    torch.ones(3 * _MEGABYTES * 2**18)  # once such a block was freed, glibc takes smaller ones from its heap
    large = [(torch.ones(_MEGABYTES * 2**18), torch.ones(2**16)) for _ in range(40)]
    small = [after for _, after in large]
    del large
    assert resident_megabytes() - before > 200
    return_memory()
    assert resident_megabytes() - before < 100
    assert len(small) == 40
