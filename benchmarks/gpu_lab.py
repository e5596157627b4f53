"""The lab's trainings on a machine that is lent for minutes: some minutes of a job, and a file to go on from.

    python benchmarks/gpu_lab.py pack DATA.npz build/gpu-lab/data.npz --image-size 16 --classes 20
    python benchmarks/gpu_lab.py run build/gpu-lab --seconds 400 -- noniid-classes --scale paper --device cuda \\
        --data build/gpu-lab/data.npz

`pack` makes data small enough to travel. `run` goes on with the folder's job where it was: rows that are done are
skipped, a training that was stopped begins at its last checkpoint. It stops in time, and packs the job as
job.tar.gz, which `run` unpacks at the next start if the job's folder is not there.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

_ROOT = Path(__file__).resolve().parent.parent
_TO_STOP = 20  # seconds that a job is given to leave a checkpoint


def pack(source: Path, target: Path, image_size: int, classes: int | None) -> None:
    """Write an .npz file of the lab with smaller images, of the first classes.

    Args:
        source: with images (N, H, W, C) or (N, H, W), and labels (N,).
        target: compressed.
        image_size: height and width.
        classes: how many; None for all.
    """
    found = {}
    with np.load(source) as data:
        for name in data.files:
            labels = data[name.replace("images", "labels")] if "images" in name else data[name]
            kept = np.ones(len(labels), bool) if classes is None else labels < classes
            found[name] = data[name][kept] if len(data[name]) == len(labels) else data[name]
    for name, values in found.items():
        if "images" in name and values.shape[1] != image_size:
            images = torch.from_numpy(values).float()
            channels_first = images.movedim(-1, 1) if images.ndim == 4 else images[:, None]
            smaller = F.interpolate(channels_first, size=image_size, mode="area").round().byte()
            found[name] = (smaller.movedim(1, -1) if images.ndim == 4 else smaller[:, 0]).numpy()
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target, **found)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


def run(folder: Path, out: Path, seconds: float, arguments: list[str]) -> int:
    """Go on with a job for some time.

    Args:
        folder: that has the job's results, or job.tar.gz of an earlier time.
        out: where job.tar.gz is written.
        seconds: after which the job is stopped.
        arguments: of `renorm run`.

    Returns:
        0 where the job is done or was stopped in time, else its exit status.
    """
    job, packed = folder / "job", folder / "job.tar.gz"
    if not job.exists() and packed.exists():
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
    paths = [str(_ROOT / "src"), str(_ROOT / "lab"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "renorm_lab", "run", *arguments, "--out", str(job), "--logger", "none"]
    process = subprocess.Popen(command, env=environment)
    start = time.monotonic()
    try:
        code = process.wait(timeout=seconds)
        print(f"done after {time.monotonic() - start:.0f} s")
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
        code = 0
        print(f"stopped after {seconds:.0f} s: run again with {out / packed.name} in {folder}")
    if not job.exists():
        print("the job has left nothing yet")
        return code
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / packed.name, "w:gz") as archive:
        archive.add(job, "job")
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="make data small enough to travel")
    packing.add_argument("source", type=Path)
    packing.add_argument("target", type=Path)
    packing.add_argument("--image-size", type=int, default=16)
    packing.add_argument("--classes", type=int, help="the first so many; all by default")
    running = commands.add_parser("run", help="some minutes of a job")
    running.add_argument("folder", type=Path, help="of the job")
    running.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu-lab")))
    running.add_argument("--seconds", type=float, default=400)
    own, _, job = " ".join(map(shlex.quote, sys.argv[1:])).partition(" -- ")  # what follows is `renorm run`'s
    options = parser.parse_args(shlex.split(own))
    if options.command == "pack":
        pack(options.source, options.target, options.image_size, options.classes)
    else:
        sys.exit(run(options.folder, options.out, options.seconds, shlex.split(job)))


if __name__ == "__main__":
    main()
