"""Builds the C++ kernels where that is possible; without them the library works too, only slower on the CPU."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import __version__, setup

OLDEST = 77  # as pyproject.toml says, which pip does not look at with --no-build-isolation
if int(__version__.partition(".")[0]) < OLDEST:
    sys.exit(f'renorm: setuptools {__version__} is too old to build it: pip install "setuptools>={OLDEST}"')

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402

# With ninja several processors compile, and an environment that is not activated has its scripts not on PATH.
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")


def without_kernels(reason: object) -> None:
    print(f"renorm: installing without the C++ kernels, {reason}", file=sys.stderr)


class Wheel(bdist_wheel):
    """A wheel for this platform where it holds the kernels, for any where they could not be built."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def kernels() -> dict[str, Any]:
    """What setup() needs to build the kernels, nothing where they cannot be."""
    if sys.platform == "win32":
        without_kernels("as they are written in vector extensions of GCC and Clang that MSVC lacks")
        return {}
    try:
        import torch
    except ImportError:
        without_kernels(
            "as torch is not in the build environment (pip install --no-build-isolation finds an installed one)"
        )
        return {}
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        without_kernels(f"as they need torch 2.10 or newer, and the build environment has {torch.__version__}")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        """A build whose failure leaves a library that works."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                without_kernels(f"as they could not be built: {error}")
                self.extensions = self.distribution.ext_modules = []

    extension = CppExtension(
        "renorm._kernels",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        # One build for every torch from 2.10 on, and every Python: it uses neither Python nor torch's C++ interface.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_link_args=["-s"] if sys.platform == "linux" else [],
        # -fwrapv, which Python's own flags bring, makes GCC 12 crash. Without errno and traps, roots and comparisons
        # become vectors; no result changes.
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fno-wrapv",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-std=c++17",
            "-fvisibility=hidden",
            "-Wno-psabi",
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
        ],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild, "bdist_wheel": Wheel},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**kernels())
