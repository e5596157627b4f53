"""Everything that a GPU has to say, in at most nine minutes: correctness, times, profiles; and the bars, printed.

    python benchmarks/gpu.py [--dry] [--out runs/gpu] [--only PHASE ...] [--seconds 520]

Each phase is a process of its own with a limit of its own, so that none can take the others down. Results are lines of
JSON, written as they come; the bars are printed at the end, whatever happened before. `--dry` goes through every phase
without a device, on tiny inputs and in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import gpu_bars

_ROOT = Path(__file__).resolve().parent.parent
_LEAST_SECONDS = 15  # a phase that has less is left out


class Phase(NamedTuple):
    """A phase and the seconds that it may take."""

    name: str
    seconds: int


# The bars' first; what only explains them comes last, and is cut where time is short.
PHASES = (
    Phase("environment", 20),
    Phase("correctness", 60),
    Phase("roofline", 25),
    Phase("layers", 100),
    Phase("resnet50", 70),
    Phase("profile", 35),
    Phase("compiled", 155),
    Phase("tests", 60),
    Phase("sweep", 90),
)


def run(phase: Phase, out: Path, dry: bool, seconds: float) -> str:
    """Run a phase.

    Args:
        phase: which.
        out: folder of the results.
        dry: whether without a device.
        seconds: that it may take.

    Returns:
        How it ended, in a word or two.
    """
    script = Path(__file__).with_name("gpu_phases.py")
    command = [sys.executable, str(script), phase.name, "--out", str(out), "--seconds", str(int(seconds) - 5)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_ROOT / "src"), str(_ROOT / "lab"), os.environ.get("PYTHONPATH", "")]),
        "RENORM_GPU": "triton",
    }  # fmt: skip
    if dry:
        command.append("--dry")
        environment |= {"TRITON_INTERPRET": "1", "RENORM_CPU": "off"}
    log = out / "logs" / f"{phase.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(command, env=environment, stderr=file, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
    if code == 0:
        return "done"
    return f"failed ({code}): {log.read_text(encoding='utf-8', errors='replace').strip().splitlines()[-1:]}"


def pack_logs(out: Path) -> None:
    """The logs as one file, since a machine may give back only a few."""
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        archive.add(out / "logs", "logs")
    shutil.rmtree(out / "logs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")), help="folder of the results"
    )
    parser.add_argument("--dry", action="store_true", help="without a device, tiny inputs, in Triton's interpreter")
    parser.add_argument("--only", nargs="+", choices=[phase.name for phase in PHASES], help="these phases alone")
    parser.add_argument("--seconds", type=float, default=520, help="that all phases may take together")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.jsonl").unlink(missing_ok=True)
    start = time.monotonic()
    ends = {}
    for phase in PHASES:
        if options.only and phase.name not in options.only:
            continue
        left = options.seconds - (time.monotonic() - start)
        if left < _LEAST_SECONDS:
            ends[phase.name] = "left out, no time"
        else:
            ends[phase.name] = run(phase, options.out, options.dry, min(phase.seconds, left))
        print(f"[{time.monotonic() - start:4.0f} s] {phase.name}: {ends[phase.name]}", flush=True)
    pack_logs(options.out)
    text = gpu_bars.summary(gpu_bars.read(options.out / "results.jsonl"), ends)
    (options.out / "summary.txt").write_text(text, encoding="utf-8")
    gpu_bars.write_tables(options.out)
    print(text)
    sys.exit(0 if all(end == "done" for end in ends.values()) else 1)


if __name__ == "__main__":
    main()
