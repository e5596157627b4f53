"""A long job does not fill the memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# In a process of its own, whose heap has no holes yet. Once a block of 24 MB was freed, glibc takes smaller ones from
# its heap, where those of 8 MB are then freed between others that stay.
_PROGRAM = """
import os
from pathlib import Path

import torch

from renorm_lab.jobs.memory import return_memory


def resident_megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


before = resident_megabytes()
torch.ones(24 * 2**18)
large = [(torch.ones(8 * 2**18), torch.ones(2**16)) for _ in range(40)]
small = [after for _, after in large]
del large
kept = resident_megabytes()
return_memory()
print(kept - before, resident_megabytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what was freed")
def test_what_a_run_has_freed_goes_back_to_the_system():
    run = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    kept, left = map(float, run.stdout.split())
    assert kept > 200
    assert left < 100
