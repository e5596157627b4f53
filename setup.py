"""Builds the C++ kernels where that is possible; without them the library works too, only slower on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from setuptools import setup


def without_kernels(reason: object) -> None:
    print(f"renorm: installing without the C++ kernels, {reason}", file=sys.stderr)


def kernels() -> dict[str, Any]:
    """What setup() needs to build the kernels, nothing without torch."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        without_kernels(
            "as torch is not in the build environment (pip install --no-build-isolation finds an installed one)"
        )
        return {}

    class OptionalBuild(BuildExtension):
        """A build whose failure leaves a library that works."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                without_kernels(f"as they could not be built: {error}")

    extension = CppExtension(
        "renorm._kernels",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        # One build for every torch from 2.10 on, and every Python: it uses neither Python nor torch's C++ interface.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_link_args=["-s"],
        # -fwrapv, which Python's own flags bring, makes GCC 12 crash.
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fno-wrapv",
            "-std=c++17",
            "-fvisibility=hidden",
            "-Wno-psabi",
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
        ],
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**kernels())
