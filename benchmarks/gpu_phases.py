"""One phase of the measurements on a GPU: lines of JSON, and a short line to read for each.

python benchmarks/gpu_phases.py PHASE --out FOLDER --seconds N [--dry]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import renorm
from gpu_bars import COPY, FUSED, NORM, OURS, SEQUENCE, TORCHS, Result, middle
from renorm.ops import backends
from shapes import LAYOUTS, shapes

_TESTS = Path(__file__).resolve().parent.parent / "tests"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
_EXAMPLES = {"ResNet-50": 128, "Inception-v3": 64}
_SMALL = ((32, 64, 8, 8), (32, 128, 7, 7), (8, 512, 4, 4), (128, 32, 4, 4), (16, 256, 7, 7))
_ROUNDS, _FLUSHED_BYTES = 15, 256_000_000


class Task(NamedTuple):
    """Where a phase runs, and how long it may."""

    device: torch.device
    dry: bool
    deadline: float
    out: Path

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline


def synchronize(task: Task) -> None:
    if not task.dry:
        torch.cuda.synchronize()


class Timer:
    """Times steps on the device, contenders interleaved; before each, what the cache holds is read away."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.flushed = torch.zeros(16 if task.dry else _FLUSHED_BYTES // 4, device=task.device)

    def once(self, step: Callable[[], object]) -> float:
        """Seconds of a step."""
        self.flushed.sum()
        if self.task.dry:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def all(self, steps: dict[str, Callable[[], object]], rounds: int = _ROUNDS) -> dict[str, float]:
        """Median milliseconds of each."""
        rounds = 1 if self.task.dry else rounds
        for step in steps.values():
            for _ in range(1 if self.task.dry else 3):
                step()
        found: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                found[name].append(self.once(step))
        return {name: middle(seconds) for name, seconds in found.items()}

    def eager(self, steps: dict[str, Callable[[], object]], rounds: int = 9, number: int = 50) -> dict[str, float]:
        """Median milliseconds of steps one after the other, the host's part and all."""
        rounds, number = (1, 1) if self.task.dry else (rounds, number)
        found: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step()
        for _ in range(rounds):
            for name, step in steps.items():
                synchronize(self.task)
                start = time.perf_counter()
                for _ in range(number):
                    step()
                synchronize(self.task)
                found[name].append((time.perf_counter() - start) / number)
        return {name: middle(seconds) for name, seconds in found.items()}


def captured(task: Task, step: Callable[[], object]) -> Callable[[], object]:
    """The step as a graph of launches, so that the host does not count."""
    if task.dry:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def environment(task: Task) -> Iterator[Result]:
    """What this is, which rivals torch takes, and what a step costs the host."""
    import triton

    yield {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    if not task.dry:
        properties = torch.cuda.get_device_properties(task.device)
        yield {"name": properties.name, "processors": properties.multi_processor_count, "L2": properties.L2_cache_size,
               "cuda": torch.version.cuda}  # fmt: skip
        for name, dtype in _DTYPES.items():
            x, numbers = (
                torch.empty(8, 64, 8, 8, device=task.device, dtype=dtype),
                [torch.ones(64, device=task.device)] * 4,
            )
            yield {
                "batch_norm_backend": str(torch._C._select_batch_norm_backend(x, *numbers, True, 1e-5)),
                "dtype": name,
            }  # type: ignore[attr-defined]
    x = torch.randn(8, 64, 4, 4, device=task.device, requires_grad=True)
    for name, layer in (("nn.BatchNorm2d", nn.BatchNorm2d(64)), ("BatchRenorm2d", renorm.BatchRenorm2d(64))):
        layer.to(task.device)
        leaves, dy, best = [x, *layer.parameters()], torch.ones_like(x), float("inf")
        for _ in range(2 if task.dry else 20):
            synchronize(task)
            start = time.perf_counter()  # of both threads: autograd has one of its own for a device
            number = 1 if task.dry else 30
            for _ in range(number):
                torch.autograd.grad(layer(x), leaves, dy)
            best = min(best, (time.perf_counter() - start) / number)
        yield {"host_us": round(1e6 * best, 1), "layer": name}


class Case(NamedTuple):
    """A layer's setting, to be compared with the same in float64 on the CPU."""

    dtype: torch.dtype
    channels_last: bool
    grouping: dict[str, int]
    masked: bool
    act: Any
    residual: bool
    shape: tuple[int, ...]
    irregular: str = ""


def cases(dry: bool) -> list[Case]:
    """Those over all kernels first."""
    dtypes = [torch.float32] if dry else list(_BOUNDS)
    groupings: tuple[dict[str, int], ...] = (
        {}, {"examples_per_group": 4}, {"channels_per_group": 4}, {"examples_per_group": 4, "channels_per_group": 2},
    )  # fmt: skip
    small, large = (8, 8, 3, 3), ((4, 8, 4, 4) if dry else (24, 72, 17, 19))
    settings = ((None, False), ("relu", True), ("silu", True), ("relu", False))
    found = [
        Case(dtype, last, grouping, masked, act, residual, shape)
        for shape in (large, small)
        for masked, (act, residual), grouping, last, dtype in itertools.product(
            (False, True), settings, groupings, (True, False), dtypes
        )
    ]
    kinds = ("sliced", "gradient of the other layout", "not on 16 bytes")
    first = [
        Case(torch.float32, last, grouping, masked, act, residual, shape, kind)
        for last in (True, False)
        for shape, grouping, masked, (act, residual), kind in (
            (large, {}, False, settings[0], ""),
            (large, {}, False, settings[1], ""),
            (large, {}, True, settings[2], ""),
            (large, groupings[1], False, settings[3], ""),
            (large, groupings[3], False, settings[1], ""),
            (small, {}, False, settings[1], ""),
            (small, groupings[1], True, settings[2], ""),
            *((large, {}, False, settings[1], kind) for kind in kinds),
        )
    ]
    return first[:8] if dry else [*first, *(case for case in found if case not in first)]


def errors(case: Case, device: torch.device) -> dict[str, float]:
    """Largest error of everything that a step computes, in units of the largest number or of 1."""
    torch.manual_seed(0)
    channels = case.shape[1]
    values = {name: torch.randn(case.shape, dtype=torch.float64) for name in ("x", "residual", "dy")}
    values["x"] = values["x"] * 2 + 1
    values = {name: value.to(case.dtype) for name, value in values.items()}
    mask = torch.rand(case.shape[0], *case.shape[2:]) < 0.8 if case.masked else None
    results = []
    for place, dtype in ((device, case.dtype), (torch.device("cpu"), torch.float64)):
        wide = torch.promote_types(dtype, torch.float32)
        layer = renorm.Norm(
            channels, limits=renorm.Limits(1.3, 0.4, start=0, r_end=10, d_end=20), act=case.act, momentum=0.5,
            dtype=wide, device=place, **case.grouping,
        ).train()  # fmt: skip
        layer.num_batches_tracked.fill_(5)
        x, residual, dy = (arranged(value.to(place, dtype), case, name) for name, value in values.items())
        x, residual = x.requires_grad_(), residual.requires_grad_()
        y = layer(x, None if mask is None else mask.to(place), residual if case.residual else None)
        leaves = [x, *layer.parameters(), *([residual] if case.residual else [])]
        results.append([y, *torch.autograd.grad(y, leaves, dy), layer.running_mean, layer.running_var])
    names = ("y", "dx", "dweight", "dbias", *(("dresidual",) if case.residual else ()), "mean", "var")
    found = {}
    for name, actual, exact in zip(names, *results, strict=True):
        actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
        apart = (actual - exact).abs()
        if case.act == "relu" and name.startswith("d"):  # rounding decides on which side of the kink an element lies
            apart = apart.flatten().sort().values[: -max(1, apart.numel() // 200)]
        found[name] = float(apart.max()) / max(1.0, float(exact.abs().max()))
    return found


def arranged(value: Tensor, case: Case, name: str) -> Tensor:
    """A tensor as a case wants it in memory."""
    last = case.channels_last != (case.irregular.startswith("gradient") and name == "dy")
    value = value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if case.irregular == "sliced" and name == "x":
        return torch.cat([value, value], -1)[..., : value.shape[-1]]
    if case.irregular == "not on 16 bytes":
        moved = value.new_empty(value.numel() + 1)[1:].as_strided(value.shape, value.stride(), 1)
        return moved.copy_(value)
    return value


def correctness(task: Task) -> Iterator[Result]:
    """How layers conduct themselves, then layers against the same in float64: first a case of every kernel."""
    try:
        yield from conduct(task)
    except Exception as failure:
        yield {"case": "conduct", "right": False, "failure": f"{type(failure).__name__}: {failure}"[:300]}
    for case in cases(task.dry):
        if task.is_over:
            return
        layout = "channels last" if case.channels_last else "contiguous"
        settings = f"{case.grouping or 'batch'}{' masked' * case.masked} {case.act}{' residual' * case.residual}"
        text = f"{str(case.dtype)[6:]} {layout} {settings} {case.shape} {case.irregular}"
        try:
            found = errors(case, task.device)
        except Exception as failure:
            yield {"case": text, "right": False, "failure": f"{type(failure).__name__}: {failure}"[:300]}
            continue
        name, error = max(found.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
        bound = _BOUNDS[case.dtype] * (10 if name in ("dweight", "dbias") else 1)
        yield {"case": text, "error": f"{name} {error:.1e}", "right": bool(error <= bound)}


def conduct(task: Task) -> Iterator[Result]:
    """The same bits twice, a step under a captured graph, a batch that is not finite, another stream."""
    torch.manual_seed(0)
    x = torch.randn(16, 24, 9, 9, device=task.device)
    layer = renorm.BatchRenorm2d(24, limits=renorm.Limits(start=0, r_end=9, d_end=9)).to(task.device)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    first = layer(x).clone()
    layer.load_state_dict(state)
    yield {"case": "twice the same", "error": "", "right": torch.equal(first, layer(x))}
    faulty = x.clone()
    faulty[3, 5] = float("nan")
    before = layer.running_mean.clone()
    layer(faulty)
    right = torch.equal(before, layer.running_mean) and int(layer.num_batches_skipped) == 1
    yield {"case": "a batch that is not finite is skipped", "error": "", "right": right}
    if task.dry:
        return
    steps = int(layer.num_batches_tracked)
    replay = captured(task, lambda: layer(x))
    steps_before = int(layer.num_batches_tracked)
    replay()
    replay()
    moved = int(layer.num_batches_tracked) - steps_before
    yield {"case": "a captured step counts", "error": f"{moved} of 2, {steps}", "right": moved == 2}
    layer.load_state_dict(state)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other = layer(x)
    torch.cuda.synchronize()
    yield {"case": "another stream", "error": "", "right": torch.equal(other, first)}
    with torch.device("cuda"):
        layer = renorm.BatchRenorm2d(8)
        layer(torch.randn(4, 8, 3, 3))
    yield {
        "case": "default device cuda",
        "error": "",
        "right": renorm.BatchNorm1d(3)(torch.randn(4, 3)).device.type == "cpu",
    }


def roofline(task: Task) -> Iterator[Result]:
    """Bandwidth of copies by size, and of each kernel by the profiler."""
    timer = Timer(task)
    for megabytes in (0.01,) if task.dry else (6, 26, 51, 103, 205, 411):
        x = torch.empty(int(megabytes * 1e6 / 2), dtype=torch.bfloat16, device=task.device)
        milliseconds = timer.all({"copy": captured(task, lambda x=x: x.clone())})["copy"]
        yield {"megabytes": megabytes, "copy_gb_s": round(2 * megabytes / milliseconds, 1)}
    if task.dry:
        return
    for channels, size in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)):
        for name, memory_format in LAYOUTS.items():
            x = torch.randn(128, channels, size, size, device=task.device, dtype=torch.bfloat16)
            x = x.contiguous(memory_format=memory_format).requires_grad_()
            layer, dy = (
                renorm.BatchRenorm2d(channels, limits=renorm.Limits.constant()).to(task.device),
                torch.ones_like(x),
            )
            leaves = [x, *layer.parameters()]
            torch.autograd.grad(layer(x), leaves, dy)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(5):
                    torch.autograd.grad(layer(x), leaves, dy)
                torch.cuda.synchronize()
            for event in profile.key_averages():
                yield {"kernel": event.key[:60], "us": round(event.device_time_total / event.count, 1),
                       "shape": f"{channels}x{size}", "layout": name, "megabytes": x.nbytes / 1e6}  # fmt: skip


def contenders(channels: int, variant: str, device: torch.device, grouped: bool) -> dict[str, nn.Module]:
    """Layers to compare."""
    limits = renorm.Limits.constant()

    class Sequence(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            y: Tensor = self.norm(x)
            return F.relu_(y.add_(residual))

    if variant == FUSED:
        ours = renorm.BatchRenorm2d(channels, limits=limits, act="relu")

        class Fused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = ours

            def forward(self, x: Tensor, residual: Tensor) -> Tensor:
                y: Tensor = self.norm(x, None, residual)
                return y

        found = {SEQUENCE: Sequence(nn.BatchNorm2d(channels)), OURS: Fused()}
    else:
        found = {
            TORCHS: nn.BatchNorm2d(channels), OURS: renorm.BatchRenorm2d(channels, limits=limits)
        }  # fmt: skip
        if grouped:
            found["ghost"] = renorm.BatchRenorm2d(channels, limits=limits, examples_per_group=16)
            found["batch-group"] = renorm.BatchGroupNorm2d(channels, 16, examples_per_group=16)
    return {name: module.to(device).train() for name, module in found.items()}


def layers(task: Task) -> Iterator[Result]:
    """Forward and backward of layers, largest first, then small ones in eager mode."""
    timer = Timer(task)
    if task.dry:
        sizes = [("dry", (4, 16, 3, 3))]
    else:
        sizes = sorted(
            {(shape.network, (_EXAMPLES[shape.network], *shape.sizes[1:])) for shape in shapes(False)
             if shape.network in _EXAMPLES},
            key=lambda each: -torch.Size(each[1]).numel(),
        )  # fmt: skip
    large = [(network, shape, "graph") for network, shape in sizes]
    small = [("small", shape, "eager") for shape in (_SMALL[:1] if task.dry else _SMALL)]
    grouped = {shape for _, shape in sizes[:: max(1, len(sizes) // 3)]}
    for (network, shape, mode), (dtype, layout), variant in itertools.product(
        [*small, *large], itertools.product(_DTYPES, LAYOUTS), (NORM, FUSED)
    ):
        if task.is_over:
            return
        if mode == "eager" and variant == FUSED:
            continue
        size = (2, 16, 3, 3) if task.dry else shape
        common = {"network": network, "shape": "x".join(map(str, size)), "layout": layout, "dtype": dtype,
                  "variant": variant, "mode": mode}  # fmt: skip
        try:
            x, steps = layer_steps(task, size, _DTYPES[dtype], layout, variant, shape in grouped)
            if mode == "graph":
                times = timer.all({name: captured(task, step) for name, step in steps.items()})
            else:
                times = timer.eager(steps)
        except Exception as failure:
            yield {"failure": f"{common}: {type(failure).__name__}: {failure}"[:300]}
            continue
        for name, milliseconds in times.items():
            yield common | {"megabytes": round(x.nbytes / 1e6, 3), "contender": name, "ms": milliseconds}


def layer_steps(
    task: Task, shape: tuple[int, ...], dtype: torch.dtype, layout: str, variant: str, grouped: bool
) -> tuple[Tensor, dict[str, Callable[[], object]]]:
    """The input, and forward with backward of each contender."""
    x = torch.randn(shape, device=task.device, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    residual, dy = torch.randn_like(x).requires_grad_(), torch.randn_like(x)
    x.requires_grad_()
    given = (x, residual) if variant == FUSED else (x,)
    steps: dict[str, Callable[[], object]] = {}
    for name, layer in contenders(shape[1], variant, task.device, grouped).items():

        def step(layer: nn.Module = layer) -> object:
            return torch.autograd.grad(layer(*given), [*given, *layer.parameters()], dy)

        steps[name] = step
    if variant == NORM:
        steps[COPY] = x.detach().clone
    return x, steps


def network(task: Task) -> nn.Module:
    """ResNet-50, or a stand-in."""
    if task.dry:
        return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                             nn.Flatten(), nn.Linear(8, 4))  # fmt: skip
    import torchvision

    model: nn.Module = torchvision.models.resnet50(num_classes=128)
    return model


def training_steps(task: Task, batch: int, compiles: bool) -> dict[str, Callable[[], object]]:
    """A step of each variant, in bfloat16 and channels_last."""
    size, limits = (8 if task.dry else 224), renorm.Limits.constant()
    variants: dict[str, Callable[[nn.Module], nn.Module]] = {
        TORCHS: lambda model: model,
        OURS: lambda model: renorm.convert(model, renorm.BatchRenorm, limits=limits),
        "fused": lambda model: renorm.convert(model, renorm.BatchRenorm, fuse=True, limits=limits),
    }
    images = torch.randn(batch, 3, size, size, device=task.device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=task.device) % 4
    steps: dict[str, Callable[[], object]] = {}
    for name, change in variants.items():
        if compiles and name == OURS:
            continue
        torch.manual_seed(0)
        model = change(network(task)).to(task.device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        call = torch.compile(model, backend="eager" if task.dry else "inductor") if compiles else model

        def step(call: Any = call, optimizer: Any = optimizer) -> None:
            with torch.autocast(task.device.type, torch.bfloat16):
                loss = F.cross_entropy(call(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
    return steps


def resnet50(task: Task) -> Iterator[Result]:
    """Training steps, eager."""
    for batch in (2,) if task.dry else (128, 32):
        for name, milliseconds in Timer(task).all(training_steps(task, batch, compiles=False)).items():
            yield {"batch": batch, "contender": name, "ms": milliseconds, "network": "ResNet-50"}


def compiled(task: Task) -> Iterator[Result]:
    """Training steps under torch.compile."""
    batch, steps = 2 if task.dry else 128, training_steps(task, 2 if task.dry else 128, compiles=True)
    for name, step in steps.items():
        start = time.monotonic()
        step()
        synchronize(task)
        yield {"batch": batch, "contender": f"{name}, first step", "ms": 1e3 * (time.monotonic() - start)}
        alone = Timer(task).all({name: step}, rounds=5)[name]
        yield {"batch": batch, "contender": name, "ms": alone, "network": "ResNet-50, compiled"}
    for name, milliseconds in Timer(task).all(steps, rounds=5).items():  # the same, interleaved, if there is time
        yield {"batch": batch, "contender": name, "ms": milliseconds, "network": "ResNet-50, compiled"}


def profile(task: Task) -> Iterator[Result]:
    """Kernels of a training step by time."""
    activities = [torch.profiler.ProfilerActivity.CPU if task.dry else torch.profiler.ProfilerActivity.CUDA]
    for name, step in training_steps(task, 2 if task.dry else 128, compiles=False).items():
        step()
        synchronize(task)
        with torch.profiler.profile(activities=activities) as found:
            step()
            synchronize(task)
        if name == "fused" and not task.dry:
            found.export_chrome_trace(str(task.out / "trace.json.gz"))
        ranked = sorted(found.key_averages(), key=lambda event: -event.device_time_total)[: 3 if task.dry else 20]
        for event in ranked:
            yield {"variant": name, "kernel": event.key[:80], "count": event.count, "us": event.device_time_total}


def tests(task: Task) -> Iterator[Result]:
    """The kernels' own tests on the device, and some under compute-sanitizer."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_TESTS / "ops" / "test_triton.py")]
    wanted = "later_call" if task.dry else "later_call or memory or given or apart"
    left = max(10.0, task.deadline - time.monotonic())
    sanitizer = None if task.dry else shutil.which("compute-sanitizer")
    yield {"tests": finished([*command, "-k", wanted], left if sanitizer is None else left / 2)}
    if sanitizer:
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or it sees no overrun
        yield {"sanitizer": finished([sanitizer, "--error-exitcode", "1", *command, "-k", "later_call"], left / 2)}


def finished(command: list[str], seconds: float) -> list[str]:
    """The last lines of a command, which is stopped in time, its children with it."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0] + f"\nstopped after {seconds:.0f} s"
    return [*output.strip().splitlines()[-2:], f"exit status {process.returncode}"]


def sweep(task: Task) -> Iterator[Result]:
    """Constants of the cut, one at a time, at a few shapes."""
    from renorm.ops.triton import launch, tiles

    timer = Timer(task)
    changes: tuple[dict[str, Any], ...] = (
        {}, {"_WARPS": 4}, {"_WARPS_OF_PLANES": 8}, {"_CHANNELS": (128, 64, 32, 16)}, {"_CHANNELS": (32, 16)},
        {"_BYTES_PER_PARTIAL": 160}, {"_BYTES_PER_PARTIAL": 640}, {"_REGISTERS_PER_PROCESSOR": 32_768},
        {"_REGISTERS_PER_PROCESSOR": 131_072}, {"_ON_CHIP_BYTES": 0},
    )  # fmt: skip
    sizes = (
        ((4, 16, 3, 3),)
        if task.dry
        else ((128, 256, 56, 56), (128, 64, 112, 112), (128, 1024, 14, 14), (128, 512, 7, 7))
    )
    for shape, (dtype, layout) in itertools.product(sizes, itertools.product(_DTYPES, LAYOUTS)):
        x = torch.randn(shape, device=task.device, dtype=_DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
        dy = torch.randn_like(x)
        x.requires_grad_()
        for change in changes[: 2 if task.dry else None]:
            if task.is_over:
                return
            before = {name: getattr(tiles, name) for name in change}
            for name, value in change.items():
                setattr(tiles, name, value)
            launch._plans.clear()
            layer = renorm.BatchRenorm2d(shape[1], limits=renorm.Limits.constant()).to(task.device)

            def step(layer: nn.Module = layer, x: Tensor = x, dy: Tensor = dy) -> object:
                return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

            found = timer.all({"step": captured(task, step)}, rounds=7)
            for name, value in before.items():
                setattr(tiles, name, value)
            yield {"shape": "x".join(map(str, shape)), "dtype": dtype, "layout": layout, "change": str(change),
                   "ms": found["step"]}  # fmt: skip
    launch._plans.clear()


PHASES = {phase.__name__: phase for phase in (
    environment, correctness, roofline, layers, resnet50, profile, compiled, tests, sweep,
)}  # fmt: skip


def take_cpu_for_the_device() -> None:
    """Let the kernels, interpreted, compute what is on the CPU."""
    from renorm.ops.schema import implement

    path = "renorm.ops.triton.launch"
    backends.KERNELS["cpu"] = backends.Kernels(lambda: True, path)
    backends.available["cpu"] = True
    implement("cpu", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--seconds", type=float, default=60, help="after which no new case is begun")
    parser.add_argument("--dry", action="store_true", help="without a device")
    options = parser.parse_args()
    # what is measured must be what it is called
    warnings.filterwarnings("error", message="renorm goes by torch's own kernels")
    if options.dry:
        take_cpu_for_the_device()
    device = torch.device("cpu" if options.dry else "cuda")
    task = Task(device, options.dry, time.monotonic() + options.seconds, options.out)
    with (options.out / "results.jsonl").open("a", encoding="utf-8") as file:
        for result in PHASES[options.phase](task):
            line = json.dumps({"phase": options.phase} | result)
            file.write(line + "\n")
            file.flush()
            print(line[:160], flush=True)


if __name__ == "__main__":
    main()
