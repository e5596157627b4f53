"""What has to be set before a process starts: allocator and threads."""

from __future__ import annotations

import os
from dataclasses import dataclass

# glibc gives the memory of large tensors back at every free, and each page of the next one costs a page fault.
# Beyond these thresholds it keeps the memory.
_KEEPING = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
ALLOCATORS = ("kept", "default")


@dataclass(frozen=True)
class Setting:
    """Allocator and threads of a process.

    Args:
        allocator: "default" is glibc as it is, "kept" keeps freed memory.
        threads: of torch.
    """

    allocator: str
    threads: int

    def environment(self) -> dict[str, str]:
        """The environment of a process with this setting."""
        others = {name: value for name, value in os.environ.items() if name not in _KEEPING}
        allocator = _KEEPING if self.allocator == "kept" else {}
        return others | allocator | {"OMP_NUM_THREADS": str(self.threads)}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def thread_counts() -> list[int]:
    """One, two and all, as far as there are so many."""
    return sorted({1, min(2, cores()), cores()})
