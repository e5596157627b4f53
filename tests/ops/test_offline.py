"""Every Triton kernel compiles for GPUs that need not be there, and keeps to what the design counts on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from renorm.ops.triton.tiles import MORE_REGISTERS, REGISTERS, REGISTERS_OF_PLANES, Cut, Layout, cut

_OVER_DATA = {"measure", "apply", "apply_whole", "sum_gradients", "differentiate", "differentiate_whole"}
_BETWEEN = {"settle", "settle_sharing", "settle_backward", "settle_sharing_backward"}
_AFTER = {"move"}
_WORDS = {
    "measure": "statistics",
    "apply": "output",
    "sum_gradients": "sums of the backward",
    "differentiate": "gradient of x",
}
_PROCESSORS = 132
_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "benchmarks" / "results"

# That a pass may take for an element, without a residual and an activation.
_INSTRUCTIONS = {"measure": 9, "apply": 7, "sum_gradients": 10, "differentiate": 12}

# Planes and channels of batch norm's inputs, at 224 and 299 pixels.
_RESNET_50 = ((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14),
              (512, 14), (512, 7), (2048, 7))  # fmt: skip
_INCEPTION_V3 = ((32, 149), (32, 147), (64, 147), (80, 73), (192, 71), (64, 35), (48, 35), (96, 35), (32, 35),
                 (384, 17), (128, 17), (192, 17), (160, 17), (320, 8), (384, 8), (448, 8), (192, 8))  # fmt: skip


def compiled(layers: str, capability: str) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("offline.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), layers, capability]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_keep_to_their_registers(capability: str) -> None:
    kernels = compiled("all", capability)
    assert {kernel["kernel"] for kernel in kernels} == _OVER_DATA | _BETWEEN | _AFTER
    for kernel in kernels:
        # What is spilled is a few numbers of each channel, before and after the loop over its elements.
        assert kernel["spilled_bytes"] <= 32, kernel
        assert kernel["registers"] <= (kernel["allowed"] or MORE_REGISTERS), kernel
        assert kernel["shared_bytes"] <= 48 * 1024, kernel
        assert set(kernel["numbers"]) <= {"fp64"}, "numbers keep all their digits"


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_a_network_needs_few_kernels_of_few_instructions(capability: str) -> None:
    kernels = compiled("resnet", capability)
    assert len(kernels) <= 16
    counted = [kernel for kernel in kernels if kernel["instructions_an_element"] is not None]
    assert {kernel["kernel"] for kernel in counted} == set(_INSTRUCTIONS)
    for kernel in counted:
        assert kernel["narrow_loads"] == 0, kernel
        assert kernel["wide_loads"] >= 4, kernel
        assert kernel["instructions_an_element"] <= _INSTRUCTIONS[kernel["kernel"]], kernel


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["75", "89", "100", "120", "gfx90a", "gfx942", "gfx1100"])
def test_kernels_compile_for_other_chips(chip: str) -> None:
    kernels = {kernel["kernel"] for kernel in compiled("few", chip)}
    assert kernels >= {"measure", "settle", "apply", "sum_gradients", "differentiate", "apply_whole"}


@pytest.mark.skipif(not (_RESULTS / "gpu-kernels.jsonl").exists(), reason="an sdist holds no results")
def test_the_page_has_the_committed_figures() -> None:
    """Of sm_90; made by: python tests/ops/offline.py resnet 80 90 > benchmarks/results/gpu-kernels.jsonl."""
    lines = (_RESULTS / "gpu-kernels.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["sm"] == 90]
    page = " ".join((_ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").split())
    for kernel, words in _WORDS.items():
        [row] = [row for row in rows if row["kernel"] == kernel and row["instructions_an_element"] is not None]
        figures = f"{row['instructions_an_element']:.1f} | {row['wide_loads']} | {row['registers']}"
        assert f"| {words} | {figures} |" in page
    host = (_RESULTS / "gpu-host.jsonl").read_text(encoding="utf-8").splitlines()
    [share] = [
        row["share"] for row in map(json.loads, host) if (row["layer"], row["direction"]) == ("BatchRenorm2d", "both")
    ]
    assert f"costs the host {share:.1f} times" in page


def cuts(itemsize: int, channels_last: bool) -> list[tuple[Layout, Cut]]:
    """How the inputs of both networks over 8 MB are cut, batch 128 and 64."""
    found = []
    for examples, shapes in ((128, _RESNET_50), (64, _INCEPTION_V3)):
        for channels, size in shapes:
            layout = Layout(examples, channels, size * size, channels_last, examples, 1, 1)
            if examples * channels * size * size * itemsize > 8e6:
                registers = REGISTERS if channels_last else REGISTERS_OF_PLANES
                found.append((layout, cut(layout, itemsize, _PROCESSORS, registers)))
    return found


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_large_tensors_keep_every_processor_busy(itemsize: int, channels_last: bool) -> None:
    for layout, pieces in cuts(itemsize, channels_last):
        programs = pieces.blocks * pieces.splits
        assert programs >= 2 * _PROCESSORS, (layout, pieces)
        assert pieces.share * pieces.splits >= layout.rows > pieces.share * (pieces.splits - 1)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_not_data_is_a_twentieth_of_it_at_most(itemsize: int, channels_last: bool) -> None:
    for layout, pieces in cuts(itemsize, channels_last):
        data = layout.examples * layout.channels * layout.positions * itemsize
        programs = pieces.blocks * pieces.splits
        channels_of_a_program = min(pieces.width, pieces.width // layout.positions + 2)
        if layout.channels_last:
            channels_of_a_program = pieces.width
        coefficients = 3 * 4 * channels_of_a_program * programs
        partials = 4 * 4 * layout.channels * pieces.slots
        assert max(coefficients, partials) <= 0.05 * data, (layout, pieces)


@pytest.mark.parametrize(
    ("channels", "width"), [(64, 64), (2048, 64), (96, 32), (80, 32), (48, 16), (32, 32), (3, 4), (448, 64)]
)
def test_tiles_are_as_wide_as_wastes_little(channels: int, width: int) -> None:
    assert cut(Layout(64, channels, 1225, True, 64, 1, 1), 2, _PROCESSORS, REGISTERS).width == width
