"""The command line of a benchmark, and the processes that it starts."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from csvfiles import Row, write_machine, write_rows
from machine import describe
from settings import Setting


def measure_with(setting: Setting, script: str, arguments: list[str]) -> Iterator[Row]:
    """Run a script as a worker, which prints each row as a line of JSON.

    Args:
        setting: of the worker.
        script: path of the script.
        arguments: handed on, after --worker and the setting.

    Yields:
        The rows, with the setting.

    Raises:
        CalledProcessError: the worker failed.
    """
    command = [sys.executable, script, "--worker", setting.allocator, str(setting.threads), *arguments]
    with subprocess.Popen(command, env=setting.environment(), stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            yield {"allocator": setting.allocator, "threads": setting.threads} | json.loads(line)
    if worker.returncode:
        raise subprocess.CalledProcessError(worker.returncode, [Path(script).name, *command[2:]])


def run(
    script: str,
    doc: str,
    settings: Callable[[bool], list[Setting]],
    work: Callable[[Setting, bool], Iterator[Row]],
    *packages: str,
) -> None:
    """The command line of a benchmark: a process for each setting, and a CSV file named after the script.

    Args:
        script: its path.
        doc: its docstring.
        settings: called with whether to be quick.
        work: what a process measures, with its setting and whether to be quick.
        packages: whose versions are written down besides torch's.
    """  # fmt: skip
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(script).parent / "results", help="folder of the CSV files")
    parser.add_argument("--quick", action="store_true", help="little input and few rounds, to try the script")
    parser.add_argument("--worker", nargs=2, metavar=("ALLOCATOR", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        allocator, threads = options.worker
        torch.set_num_threads(int(threads))
        for row in work(Setting(allocator, int(threads)), options.quick):
            print(json.dumps(row), flush=True)
        return
    rows, name = [], Path(script).stem
    for setting in settings(options.quick):
        for row in measure_with(setting, script, ["--quick"] * options.quick):
            rows.append(row)
            print(*row.values(), sep="  ", flush=True)
        write_rows(options.out / f"{name}.csv", rows)  # an interrupted run keeps what it has
    write_machine(options.out / f"{name}-machine.csv", describe(*packages))
