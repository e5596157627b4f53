"""Whether this installation works, what it computes with and why, as text."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layers import BatchRenorm2d
from .limits import Limits
from .ops import backends
from .selftest import selftest

_OPTIONAL = (
    "triton", "torchvision", "timm", "lightning", "transformers", "stable-baselines3", "torchmetrics", "tensorboard",
    "onnx", "matplotlib", "rich",
)  # fmt: skip
_BUILD = "pip install torch ninja setuptools && pip install --no-build-isolation --force-reinstall --no-deps ."
_SPEED_SHAPES = {"cpu": (32, 64, 28, 28), "cuda": (64, 128, 56, 56)}
_ROUNDS, _WARM_UP = 15, 3


class Backend(NamedTuple):
    """What layers compute with on a kind of device.

    Args:
        name: in words.
        reason: why this one.
        remedy: what to do for a better one; empty where there is nothing to do.
        works: whether nothing is broken.
    """

    name: str
    reason: str
    remedy: str = ""
    works: bool = True


def doctor(write: Callable[[str], object] = print) -> bool:
    """Examine this installation: versions, backends, a self-test and a rough comparison of speed.

    Args:
        write: called with each line.

    Returns:
        Whether everything that is there works.
    """
    write("Versions")
    for name, version in _versions().items():
        write(f"  {name:<12}{version}")
    backends = {"cpu": cpu_backend(), "cuda": gpu_backend()}
    write("\nBackends")
    for backend, kind in zip(backends.values(), ("CPU", "GPU"), strict=True):
        write(f"  {kind:<12}{backend.name}: {backend.reason}")
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    works = all(backend.works for backend in backends.values())
    remedies = [backend.remedy for backend in backends.values() if backend.remedy]
    for device in devices:
        if not _write_selftest(device, write):
            works = False
            remedies.append(_remedy_of_results(device))
    write("\nSpeed, forward and backward in float32 (rough: a moment's measurement on whatever else runs here)")
    for device in devices:
        write(f"  {device:<12}{_speed(device)}")
    write("\nWhat to do" if remedies else "\nNothing to do.")
    for remedy in remedies:
        write(f"  - {remedy}")
    write(f"\n{'Everything works.' if works else 'Something does not work.'}")
    return works


def cpu_backend() -> Backend:
    """What layers compute with on the CPU.

    Returns:
        The C++ kernels, or torch's operations and why.
    """
    wanted = os.environ.get("RENORM_CPU")
    if wanted == "off":
        return Backend("torch's own operations", "RENORM_CPU=off asks for them", "unset RENORM_CPU for the C++ kernels")
    library = next(iter(backends.library_files()), None)
    if not backends.has_stable_abi():
        then = "" if library else f"; then, with a C++17 compiler and in the source tree: {_BUILD}"
        reason = f"the C++ kernels need torch 2.10 or newer, and this is {torch.__version__}"
        return Backend("torch's own operations", reason, f"for the C++ kernels: pip install --upgrade torch{then}")
    if library is None:
        remedy = f"build the C++ kernels, with a C++17 compiler and in the source tree: {_BUILD}"
        return Backend("torch's own operations", "the C++ kernels were not built", remedy)
    if not backends.available["cpu"]:
        remedy = f"build the C++ kernels against this torch, in the source tree: {_BUILD}"
        return Backend("torch's own operations", f"{library.name} does not load: {_why(library)}", remedy, works=False)
    held = f", held back by RENORM_CPU={wanted}" if wanted else ""
    return Backend(f"C++ kernels for {backends.instruction_set()}", f"{library.name} loads{held}")


def gpu_backend() -> Backend:
    """What layers compute with on a GPU.

    Returns:
        The Triton kernels, or torch's own and why; or that there is no GPU.
    """
    if not torch.cuda.is_available():
        return Backend("none", "torch sees no GPU")
    if backends.available["cuda"]:
        return Backend(f"Triton kernels on {torch.cuda.get_device_name()}", "RENORM_GPU=triton asks for them")
    if os.environ.get("RENORM_GPU") == "triton":
        return Backend("torch's own kernels", "Triton is not installed", "install Triton: pip install triton")
    return Backend("torch's own kernels", "no device has run renorm's yet; RENORM_GPU=triton asks for them")


def _why(library: Path) -> str:
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return " ".join(str(error).split())
    return "it was not there, or did not load, when renorm was imported"


def _versions() -> dict[str, str]:
    from . import __version__

    found = {
        "renorm": __version__, "torch": torch.__version__, "Python": platform.python_version(),
        "platform": f"{platform.platform()}, {torch.get_num_threads()} threads",
    }  # fmt: skip
    optional = {name: _version(name) for name in _OPTIONAL}
    found["optional"] = ", ".join(f"{name} {version}" for name, version in optional.items() if version) or "none"
    found["not found"] = ", ".join(name for name, version in optional.items() if not version) or "none"
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _write_selftest(device: str, write: Callable[[str], object]) -> bool:
    write(f"\nSelf-test on {device} against the definition in float64: output, gradients, running statistics")
    results = selftest(device)
    for result in results:
        dtype = str(result.dtype).removeprefix("torch.")
        found = f"  {dtype:<12}{result.cases} cases, largest error {result.error:.1e}, bound {result.bound:.1e}"
        write(f"{found}: {'passed' if result.passed else f'FAILED, {result.worst}'}")
    return all(result.passed for result in results)


def _remedy_of_results(device: str) -> str:
    variable = "RENORM_CPU" if device == "cpu" else "RENORM_GPU"
    if not backends.available[device]:
        return f"results on {device} are wrong: report this text"
    return f"results on {device} are wrong: set {variable}=off for torch's own operations, and report this text"


def _speed(device: str) -> str:
    shape = _SPEED_SHAPES[device]
    x = torch.randn(shape, device=device)
    torchs = nn.BatchNorm2d(shape[1], device=device)
    ours = BatchRenorm2d(shape[1], limits=Limits.constant(), device=device)
    pairs = [(_seconds(ours, x), _seconds(torchs, x)) for _ in range(_WARM_UP + _ROUNDS)][_WARM_UP:]
    ratio = median(mine / theirs for mine, theirs in pairs)
    milliseconds = [1e3 * median(times) for times in zip(*pairs, strict=True)]
    return (f"BatchRenorm2d takes {ratio:.2f} times as long as nn.BatchNorm2d ({milliseconds[0]:.2f} and "
            f"{milliseconds[1]:.2f} ms, input {shape})")  # fmt: skip


def _seconds(layer: nn.Module, x: Tensor) -> float:
    x = x.detach().requires_grad_()
    start = _now(x)
    layer(x).backward(x.detach())
    return _now(x) - start


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
