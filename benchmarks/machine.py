"""What the figures were measured on: processor, memory, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import renorm
from csvfiles import Row
from renorm.ops import backends
from settings import cores

_CPU_INFO = Path("/proc/cpuinfo")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def describe(*packages: str) -> Row:
    """What this process runs on.

    Args:
        *packages: further packages whose version matters.

    Returns:
        Value of each property.
    """
    info = _cpu_info()
    flags = info.get("flags", "").split()
    description: Row = {
        "processor": info.get("model name", platform.processor() or platform.machine()),
        "cores": cores(),
        "avx2": "avx2" in flags,
        "avx512f": "avx512f" in flags,
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "huge_pages": _huge_pages(),
        "system": platform.platform(terse=True),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "renorm": renorm.__version__,
        "renorm_kernels": backends.available["cpu"],
    }
    return description | {package: metadata.version(package) for package in packages}


def _cpu_info() -> dict[str, str]:
    """The properties of the last core; all are alike."""
    if not _CPU_INFO.exists():
        return {}
    lines = _CPU_INFO.read_text().splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _huge_pages() -> str:
    """The choice in brackets among those of the file, as in "always [madvise] never"."""
    if not _HUGE_PAGES.exists():
        return "unknown"
    return _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
