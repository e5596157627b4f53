"""Compiles what the Triton kernels launch for real layers, for GPUs that need not be there; a line of JSON each.

A process of its own: the kernels must not be interpreted. Arguments: which layers, then the chips, "90" or "gfx942". Of
"few" one learns that they compile, of "resnet" and "all", for NVIDIA's chips, what the assembler says.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from renorm.activation import Activation
from renorm.grouping import Grouping
from renorm.limits import Limits
from renorm.ops.problem import Inputs, Running, RunningState, Settings
from renorm.ops.tracking import Rule
from renorm.ops.triton import launch, plans

_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
    torch.int64: "i64",
}  # fmt: skip
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_PROCESSORS = 132
_READS = {"measure": 1, "apply": 1, "sum_gradients": 2, "differentiate": 2}  # tensors, without residual and activation
_SHOWN = ("E", "BC", "RUN", "W", "ACT", "CHANNELS_LAST", "PLANES", "MASKED", "RESIDUAL", "WRITES", "WRITTEN", "DIVISOR")


class Layer(NamedTuple):
    """A layer's input and options."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    act: Activation | None = None
    residual: bool = False
    mask: bool = False
    grouping: Grouping = Grouping()


class Recorder:
    """What stands in for a launch: the kernel and what it was given."""

    calls: ClassVar[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = []

    def first(self: Any, _: None, *tensors: Tensor | None) -> None:
        Recorder.calls.append((self._kernel, (*tensors, *self._numbers), self._constants))


def run(layer: Layer, evaluates: bool) -> None:
    """Go through the launches of a layer: a step, its backward, evaluation without and with an example weight."""
    x = torch.empty(layer.shape, dtype=layer.dtype, device="meta")
    if layer.channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    channels, wide = layer.shape[1], torch.promote_types(layer.dtype, torch.float32)
    weight, bias, mean, var = (torch.empty(channels, device="meta", dtype=wide) for _ in range(4))
    counters = [torch.empty((), dtype=torch.int64, device="meta") for _ in range(2)]
    mask = torch.empty((layer.shape[0], *layer.shape[2:]), dtype=torch.bool, device="meta") if layer.mask else None
    residual = x if layer.residual else None
    inputs, settings = Inputs(x, weight, bias, mask, residual), Settings(layer.grouping, 1e-5, layer.act)
    state = RunningState(mean, var, *counters)
    _, kept, plan = launch.step(inputs, settings, state, Limits(), Rule("std", 0.01))
    from_y = layer.residual and layer.act in ("relu", "relu6", "leaky_relu")
    kept_residual = residual if layer.act is not None and not from_y else None
    saved = (x, weight, mask, kept_residual, x if from_y else None, kept)
    writes = layer.residual and (layer.act is not None or layer.mask)
    launch.step_backward(x, saved, plan, settings, writes)
    if evaluates:
        launch.evaluate(inputs, settings, Running(mean, var), 0.0)
        launch.evaluate(inputs, settings, Running(mean, var), 0.1)


class Loop(NamedTuple):
    """A loop over data: its instructions, and its loads of 16 bytes and of fewer."""

    instructions: int
    wide: int
    narrow: int


def loops(cubin: bytes) -> Iterator[Loop]:
    """The loops of a kernel that load from global memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"^\s*(\.L_[\w]+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"^\s+(?:/\*[0-9a-f]+\*/)?\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\b(.*?);", line):
            found.append((code[2], line))
    for i, (name, line) in enumerate(found):
        target = re.search(r"`\((\.L_\w+)\)", line) if name.startswith("BRA") else None
        if target is None or labels.get(target[1], i) >= i:
            continue
        names = [each for each, _ in found[labels[target[1]] : i + 1]]
        loads = [each for each in names if each.startswith("LDG")]
        wide = sum(".128" in each for each in loads)
        if loads:
            yield Loop(len(names), wide, len(loads) - wide)


def target_of(chip: str) -> GPUTarget:
    """A chip of NVIDIA by its capability, or of AMD by its name."""
    if chip.isdecimal():
        return GPUTarget("cuda", int(chip), 32)
    return GPUTarget("hip", chip, 64 if chip.startswith("gfx9") else 32)


def source_of(kernel: Any, values: dict[str, Any]) -> ASTSource:
    """A kernel, specialized as a launch with these arguments would specialize it."""
    constants: dict[Any, Any] = {}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value is None or kernel.params[index].is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            assert kernel.params[index].do_not_specialize, (kernel.__name__, name)
            signature[name] = "i32"
        else:
            signature[name] = kernel.params[index].annotation_type
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], capability: int) -> dict[str, Any]:
    """What the assembler says of a kernel."""
    options = dict(options)
    warps, allowed = options.pop("num_warps", 4), options.pop("maxnreg", None)
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    source = source_of(kernel, values)
    built = triton.compile(source, target_of(str(capability)), {"num_warps": warps, "maxnreg": allowed})
    with tempfile.TemporaryDirectory() as folder:
        ptx, architecture = Path(folder, "kernel.ptx"), f"sm_{capability}" + ("a" if capability == 90 else "")
        ptx.write_text(built.asm["ptx"])
        run = subprocess.run(
            [_TOOLS / "ptxas", "-v", f"-arch={architecture}", ptx, "-o", Path(folder, "kernel.o")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    registers = int(re.findall(r"Used (\d+) registers", run.stderr)[0])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", run.stderr)))
    loop = max(loops(built.asm["cubin"]), key=lambda loop: (loop.wide, loop.narrow), default=Loop(0, 0, 0))
    name, x = kernel.__name__, values.get("x")
    plain = options.get("ACT", 0) == 0 and not options.get("RESIDUAL") and loop.wide > 0
    elements = loop.wide / _READS[name] * 16 / x.element_size() if name in _READS and plain else None
    return {
        "kernel": name, "sm": capability, "dtype": None if x is None else str(x.dtype), "warps": warps,
        "registers": registers, "allowed": allowed, "shared_bytes": built.metadata.shared, "spilled_bytes": spilled,
        "wide_loads": loop.wide, "narrow_loads": loop.narrow,
        "instructions_an_element": None if elements is None else round(loop.instructions / elements, 2),
        "numbers": sorted({kind for kind in source.signature.values() if kind.startswith("fp")}),
    }  # fmt: skip


def networks(name: str) -> Iterator[Layer]:
    """Layers of networks, in training; of "all", shapes and options apart from each other."""
    if name == "few":  # of everything one
        for dtype, channels_last in product(list(_TYPES)[:4], (True, False)):
            yield Layer((64, 96, 35, 35), dtype, channels_last, act="gelu", residual=True)
        yield Layer((8, 16, 4, 4), mask=True)
        return
    if name == "resnet":  # batch 128, mixed precision: with the activation, with the sum, and where the width changes
        for channels, size in ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (1024, 14), (512, 7), (2048, 7)):
            for act, residual in (("relu", False), ("relu", True), (None, False)):
                yield Layer((128, channels, size, size), act=act, residual=residual)
        return
    shapes = ((128, 256, 56, 56), (64, 96, 35, 35), (64, 1000), (64, 64, 4, 4))
    options: tuple[dict[str, Any], ...] = (
        {}, {"act": "relu"}, {"act": "relu", "residual": True}, {"mask": True}, {"act": "gelu", "residual": True},
        {"act": "silu", "mask": True, "residual": True}, {"grouping": Grouping(2, 1)},
    )  # fmt: skip
    for shape, dtype, channels_last, (i, option) in product(
        shapes, list(_TYPES)[:4], (True, False), enumerate(options)
    ):
        # all options in bfloat16; of the others the plainest and the one that keeps most in registers
        if (len(shape) == 4 or channels_last) and (dtype == torch.bfloat16 or i in (0, 5)):
            yield Layer(shape, dtype, channels_last, **option)
    for channels_last in (True, False):
        yield Layer((64, 96, 35, 35), channels_last=channels_last, act="gelu", grouping=Grouping(2, 24))
        yield Layer((64, 96, 35, 35), torch.float64, channels_last, grouping=Grouping(None, 96))


def main() -> None:
    plans.Launch.first = Recorder.first  # type: ignore[method-assign]
    plans.processors = lambda device: _PROCESSORS
    name, *chips = sys.argv[1:]
    for layer in networks(name):
        run(layer, evaluates=name == "all")
    seen = set()
    for kernel, args, options in Recorder.calls:
        types = tuple(str(each.dtype) if isinstance(each, Tensor) else type(each).__name__ for each in args)
        key = (kernel.__name__, types, tuple(sorted((name, str(value)) for name, value in options.items())))
        if key in seen:
            continue
        seen.add(key)
        for chip in chips:
            if name == "few":
                values = dict(zip(kernel.arg_names, args, strict=False)) | options
                triton.compile(source_of(kernel, values), target_of(chip), {"num_warps": options.get("num_warps", 4)})
                print(json.dumps({"kernel": kernel.__name__, "chip": chip}), flush=True)
            else:
                shape = {option: str(options[option]) for option in _SHOWN if option in options}
                print(json.dumps(compiled(kernel, args, options, int(chip)) | shape), flush=True)


if __name__ == "__main__":
    main()
