"""Is the working tree slower than a commit?

    python benchmarks/regression.py COMMIT [--rounds 25] [--threshold 1.10]

Builds both, and alternates between two processes, one for each. Prints the ratio of the medians for each case; the exit
status is 1 if their geometric mean is above the threshold. Times of different runs or machines are never compared.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from settings import Setting

_HERE = Path(__file__).parent
_ROOT = _HERE.parent
_WARMUP = 3  # visits in which a case is built and the heap grows to what it needs


class Version:
    """A process that measures a checkout.

    Args:
        name: of the version, for messages.
        checkout: root of its files.
    """

    def __init__(self, name: str, checkout: Path) -> None:
        self.name = name
        self.has_sources = (checkout / "csrc").is_dir()
        environment = Setting("kept", 1).environment()
        folders = (str(checkout / "src"), str(_ROOT / "lab"), environment.get("PYTHONPATH"))
        path = os.pathsep.join(filter(None, folders))
        self._process = subprocess.Popen(
            [sys.executable, str(_HERE / "regression_worker.py")],
            env=environment | {"PYTHONPATH": path}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.about = self._read()
        if not Path(self.about["version"]).is_relative_to(checkout):
            raise RuntimeError(f"{name}: measured {self.about['version']} instead of {checkout}")

    def seconds(self, case: str) -> float:
        """Time of a step of a case."""
        assert self._process.stdin is not None
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        seconds: float = self._read()
        return seconds

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the process that measures it has ended with {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Version:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def check_out(commit: str, folder: Path) -> None:
    """Write the files of a commit into a folder; the repository stays as it is."""
    archive = subprocess.run(["git", "archive", "--format=tar", commit], cwd=_ROOT, stdout=subprocess.PIPE, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")


def build(checkout: Path) -> None:
    """Build the C++ kernels of a checkout in place, if it has any; where that fails it goes without, as installed."""
    if (checkout / "setup.py").exists():
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(command, cwd=checkout, stdout=subprocess.DEVNULL, check=False)


def ratio(case: str, base: Version, head: Version, rounds: int) -> float:
    """Time of a case in the new version over that in the old one.

    Args:
        case: its name.
        base: the old version.
        head: the new version.
        rounds: visits to each, in random order.

    Returns:
        The ratio of the medians.
    """
    seconds: dict[str, list[float]] = {base.name: [], head.name: []}
    for turn in range(_WARMUP + rounds):
        for version in random.sample((base, head), 2):
            second = version.seconds(case)
            if turn >= _WARMUP:
                seconds[version.name].append(second)
    return statistics.median(seconds[head.name]) / statistics.median(seconds[base.name])


def refuse_unlike(base: Version, head: Version) -> None:
    """End the program if one version goes without kernels that it has the sources of, and the other does not."""
    for version in (base, head):
        print(f"{version.name}: {'with' if version.about['kernels'] else 'without'} C++ kernels")
        if version.has_sources and not version.about["kernels"] and base.about["kernels"] != head.about["kernels"]:
            sys.exit(f"{version.name}: its C++ kernels could not be built, which would be all that is measured")


def compare(base: Version, head: Version, rounds: int) -> float:
    """Print the ratio of every case.

    Args:
        base: the old version.
        head: the new version.
        rounds: visits to each, for each case.

    Returns:
        The geometric mean of the ratios.
    """
    found = []
    for case in base.about["cases"]:
        found.append(ratio(case, base, head, rounds))
        print(f"{found[-1]:6.3f}  {case}", flush=True)
    return statistics.geometric_mean(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="what to compare the working tree with")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threshold", type=float, default=1.10, help="the most that the geometric mean may be")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder).resolve()
        check_out(options.commit, checkout)
        build(checkout)
        build(_ROOT)
        with Version(options.commit, checkout) as base, Version("working tree", _ROOT) as head:
            refuse_unlike(base, head)
            mean = compare(base, head, options.rounds)
    slower = mean > options.threshold
    print(f"{mean:6.3f}  geometric mean, {'MORE' if slower else 'not more'} than {options.threshold}")
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
