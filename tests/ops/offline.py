"""Compiles what the Triton kernels launch for real layers, for GPUs that need not be there; a line of JSON each.

A process of its own: the kernels must not be interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from renorm.grouping import Grouping
from renorm.ops.problem import Inputs, Running, RunningState, Settings
from renorm.ops.schema import Saved
from renorm.ops.tracking import Rule
from renorm.ops.triton import backward, forward, launch, settle, tracking

_MODULES = (forward, backward, settle, tracking)
_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
    torch.int64: "i64",
}  # fmt: skip
_PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class Recorder:
    """Stands in for a kernel, and keeps what it was called with."""

    calls: ClassVar[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = []

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.calls.append((self.kernel, args, options))


def layers() -> None:
    """The launches of layers: large and small, both layouts and precisions, plain, grouped and fused."""
    for shape in ((128, 256, 56, 56), (32, 512, 7, 7), (4, 80, 73, 73), (64, 1000)):
        for dtype, channels_last in ((torch.bfloat16, True), (torch.float32, False), (torch.float32, True)):
            if len(shape) == 2 and channels_last:
                continue
            x = torch.empty(shape, dtype=dtype, device="meta")
            if channels_last:
                x = x.to(memory_format=torch.channels_last)
            channels = shape[1]
            numbers = [torch.empty(channels, device="meta") for _ in range(4)]
            counters = [torch.empty((), dtype=torch.int64, device="meta") for _ in range(2)]
            limit = torch.empty((), device="meta")
            for residual, act, grouping in (
                (None, None, Grouping()),
                (x, "relu", Grouping()),
                (x, "gelu", Grouping(2, channels // 4)),
            ):
                weight, bias, mean, var = numbers
                inputs, settings = Inputs(x, weight, bias, None, residual), Settings(grouping, 1e-5, act)
                state, rule = RunningState(mean, var, *counters), Rule("std", 0.01)
                _, count, coefficients = launch.normalize_and_track(inputs, settings, state, (limit, limit), rule)
                saved = Saved(x, weight, bias, None, None, residual, count, coefficients)
                launch.normalize_backward(x, saved, grouping, act, residual is not None)
                launch.evaluate(inputs, settings, Running(mean, var), 0.1)
                launch.evaluate(inputs, settings, Running(mean, var), 0.0)


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], capability: int) -> dict[str, Any]:
    """What the assembler says of a kernel, specialized as a launch would specialize it."""
    options = dict(options)
    warps = options.pop("num_warps", 4)
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    constants: dict[Any, Any] = {}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value is None or kernel.params[index].is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        ptx, architecture = Path(folder, "kernel.ptx"), f"sm_{capability}" + ("a" if capability == 90 else "")
        ptx.write_text(built.asm["ptx"])
        run = subprocess.run(
            [_PTXAS, "-v", f"-arch={architecture}", ptx, "-o", Path(folder, "kernel.o")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    registers = int(re.findall(r"Used (\d+) registers", run.stderr)[0])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", run.stderr)))
    return {
        "kernel": kernel.__name__, "sm": capability, "warps": warps, "registers": registers,
        "shared_bytes": built.metadata.shared, "spilled_bytes": spilled,
    }  # fmt: skip


def specialization(argument: Any) -> str:
    """What a kernel is compiled anew for."""
    if isinstance(argument, Tensor):
        return str(argument.dtype)
    return type(argument).__name__ + (" / 16" if isinstance(argument, int) and argument % 16 == 0 else "")


def main() -> None:
    for module in _MODULES:
        for name in ("measure", "apply", "apply_whole", "sum_gradients", "differentiate", "differentiate_whole",
                     "settle", "settle_backward", "_move"):  # fmt: skip
            if hasattr(module, name) and hasattr(getattr(module, name), "arg_names"):
                setattr(module, name, Recorder(getattr(module, name)))
    launch.processors = lambda device: 132
    layers()
    seen = set()
    for kernel, args, options in Recorder.calls:
        types = tuple(map(specialization, args))
        key = (kernel.__name__, types, tuple(sorted((name, str(value)) for name, value in options.items())))
        if key in seen:
            continue
        seen.add(key)
        for capability in map(int, sys.argv[1:]):
            shape = {name: options[name] for name in ("E", "BC", "RUN", "ACT", "CHANNELS_LAST") if name in options}
            print(json.dumps(compiled(kernel, args, options, capability) | shape), flush=True)


if __name__ == "__main__":
    main()
