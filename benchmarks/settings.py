"""What has to be set before a process starts, allocator and threads, and processes that are started so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from csvfiles import Row

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


def measure_with(setting: Setting, script: str, arguments: list[str]) -> Iterator[Row]:
    """Run a script as a worker, which prints each row as a line of JSON.

    Args:
        setting: of the worker.
        script: path of the script.
        arguments: handed on, after --worker and the setting.

    Yields:
        The rows, with the setting.

    Raises:
        CalledProcessError: the worker failed.
    """
    command = [sys.executable, script, "--worker", setting.allocator, str(setting.threads), *arguments]
    with subprocess.Popen(command, env=setting.environment(), stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            yield {"allocator": setting.allocator, "threads": setting.threads} | json.loads(line)
    if worker.returncode:
        raise subprocess.CalledProcessError(worker.returncode, [Path(script).name, *command[2:]])
