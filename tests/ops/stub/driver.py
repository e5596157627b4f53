"""Lets Triton's launchers run without a device: they call a driver whose every function succeeds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton


def build(folder: Path) -> Path | None:
    """Build the stub as libcuda.so.1 in a folder; None where no C compiler is."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source, library = Path(__file__).with_name("libcuda.c"), folder / "libcuda.so.1"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{headers}", source, "-o", library], check=True)
    return library


def run(script: Path, folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in a process whose driver is the stub, built in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder), "RENORM_CPU": "off",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path]),
    }  # fmt: skip
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def ensure(script: Path, folder: Path, *arguments: str) -> None:
    """Begin this script again under the stub, and end with it, unless it was begun so."""
    if os.environ.get("TRITON_LIBCUDA_PATH"):
        return
    if build(folder) is None:
        sys.exit(f"{script.name}: needs a C compiler")
    again = run(script, folder, *arguments)
    print(again.stdout, end="")
    sys.exit(0 if again.returncode == 0 else again.stderr[-2000:])


def activate(capability: tuple[int, int] = (9, 0), processors: int = 132) -> None:
    """In such a process: make Triton take the stub for a device, and renorm tensors of the CPU for that device's."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    from renorm.ops import backends, dispatch
    from renorm.ops.schema import implement
    from renorm.ops.triton import plans

    class Stub(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_device_capability = lambda device=0: capability
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

    triton.runtime.driver.set_active(Stub())
    plans.processors = lambda device: processors
    path = "renorm.ops.triton.launch"
    backends.KERNELS["cpu"] = backends.Kernels(lambda: True, path, path)
    backends.available["cpu"] = True
    dispatch._kinds.clear()
    implement("cpu", path)
