"""What a reader has to open to follow a batch from the layer to the kernel: the files that it is handed to."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

import renorm

PACKAGE = Path(renorm.__file__).parent
MOST_FILES = 8


def file_of(frame: FrameType | None) -> str | None:
    """The file of the package that a frame is in, or was called from."""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return file.relative_to(PACKAGE).as_posix()
        frame = frame.f_back
    return None


def walk(layer: renorm.Norm, x: torch.Tensor) -> list[str]:
    """The files that a batch is handed to, one after the other, from the layer on."""
    found: list[str] = []

    def look(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            return
        arguments = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[: frame.f_code.co_argcount]]
        has_it = any(a is x or (isinstance(a, tuple) and any(part is x for part in a)) for a in arguments)
        file = file_of(frame)
        if has_it and file is not None and file != file_of(frame.f_back) and found[-1:] != [file]:
            found.append(file)

    layer(x)  # what happens at the first call only
    before = sys.getprofile()
    sys.setprofile(look)
    try:
        layer(x)
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("limits", [None, renorm.Limits.constant()], ids=["batch norm", "batch renorm"])
def test_from_the_layer_to_the_kernel_a_batch_passes_few_files_once_each(limits: renorm.Limits | None) -> None:
    layer = renorm.BatchRenorm2d(4, limits=limits)
    found = walk(layer, torch.randn(3, 4, 5, 5, requires_grad=True))
    assert found[0] == "norm.py"
    assert found[-1] == "ops/native.py"
    in_cpp = 1  # csrc/step.cpp
    assert len(found) + in_cpp <= MOST_FILES, found
    assert len(set(found)) == len(found), found
