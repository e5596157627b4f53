"""Fills a Triton cache without a device, and packs it, so that a machine that is lent for minutes compiles nothing.

    python benchmarks/gpu_cache.py build/gpu-cache.tar.gz --cache /tmp/renorm-triton-cache

There, with the same Triton and Python: unpack it to the same path, since the cache holds paths, and set
TRITON_CACHE_DIR to it. Kernels of ResNet-50's and Inception-v3's layers, the tests' and the phases'.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from pathlib import Path

_TESTS = Path(__file__).resolve().parent.parent / "tests" / "ops"
_KEPT = {".cubin", ".json", ".so"}  # the rest is what they were made from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="the packed cache")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/renorm-triton-cache"), help="where it will be used")
    parser.add_argument("--processors", type=int, default=132, help="multiprocessors of the device")
    parser.add_argument("--layers", default="all", choices=["resnet", "all"])
    options = parser.parse_args()
    sys.path.insert(0, str(_TESTS))
    from stub import driver

    os.environ["TRITON_CACHE_DIR"] = str(options.cache)
    driver.ensure(Path(__file__), options.target.resolve().parent / "stub", *sys.argv[1:])
    import offline

    driver.activate(processors=options.processors)
    for layer in offline.networks(options.layers):
        offline.run(layer, evaluates=True)
    options.target.parent.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(options.cache.rglob("*")) if path.suffix in _KEPT]
    with tarfile.open(options.target, "w:gz") as archive:
        for path in files:
            archive.add(path, path.relative_to(options.cache))
    print(
        f"{options.target}: {len(files)} files, {options.target.stat().st_size / 1e6:.1f} MB; unpack to {options.cache}"
    )


if __name__ == "__main__":
    main()
