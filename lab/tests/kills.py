"""Trainings that are killed at random instants and started again: `python lab/tests/kills.py FOLDER --folders 30`.

Every folder that comes out must be that of the same command, never stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
COMMON = ("--scale=tiny", "--logger=none", "--save-weights=true", "--out=out")
COMMANDS = {
    "noniid": ("noniid", "--methods=[batch_norm,batch_renorm]", "--average=0.9", "--augment=true"),
    "microbatch": ("microbatch", "--methods=[batch_norm,batch_renorm]", "--group-sizes=[8,2]", "--average=0.9"),
    "finetune": ("finetune", "--methods=[batch_renorm,group_norm]", "--steps=20", "--pretraining-steps=10"),
}
_LONGEST = 900.0  # seconds until a run that is not killed must have ended
_POLL = 0.005

Start = Callable[[Sequence[str], Path], int]


@dataclass
class Outcome:
    """What came of a folder whose runs were killed.

    Args:
        kills: signals that met a process, each with the seconds after its start and what it exited with.
        failures: errors and differences; none if the folder is as it should be.
    """

    kills: list[tuple[str, float, int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def command(name: str, every: int, workers: int) -> list[str]:
    """The arguments of `renorm` for one of `COMMANDS`, which write to the folder out."""
    return ["run", *COMMANDS[name], *COMMON, f"--checkpoint-every={every}", f"--workers={workers}"]


def start_command(arguments: Sequence[str], folder: Path) -> int:
    """Start `renorm` as a user does, in a session of its own; gives the process's id."""
    with (folder / "stderr.txt").open("wb") as errors:
        return subprocess.Popen([sys.executable, "-m", "renorm_lab", *arguments], cwd=folder, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=errors).pid  # fmt: skip


def start_forked(arguments: Sequence[str], folder: Path) -> int:
    """The same without the seconds of its imports: this process, which has done them, forks."""
    from lightning.fabric import Fabric  # noqa: F401

    from renorm_lab.cli import main

    if pid := os.fork():
        with suppress(OSError):  # the child was faster
            os.setpgid(pid, pid)
        return pid
    status = 70
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        errors = os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main(arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _status(pid: int, seconds: float) -> int | None:
    """What a process exited with, negative for a signal; None if it is still running after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(_POLL)


def undisturbed(arguments: Sequence[str], folder: Path, start: Start) -> float:
    """Carry out a command; gives the seconds that it took."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    status = _status(start(arguments, folder), _LONGEST)
    if status != 0:
        raise RuntimeError(f"{folder}: exited with {status}: {(folder / 'stderr.txt').read_text()[-2000:]}")
    return time.monotonic() - began


def disturbed(
    arguments: Sequence[str], folder: Path, start: Start, *, kills: int, seconds: float, chance: random.Random
) -> Outcome:
    """Carry out a command that is killed at random instants, and started again at once each time.

    Args:
        arguments: of `renorm`.
        folder: where to start it; its results are in the folder out there.
        start: starts it.
        kills: how many processes are killed before one is let be.
        seconds: within which of its start a process is killed.
        chance: random numbers.

    Returns:
        What was done, and which processes ended as they should not.
    """
    folder.mkdir(parents=True)
    outcome = Outcome()
    for number in range(kills + 1):
        pid = start(arguments, folder)
        # some instants are in the seconds of imports and loading, most are in the trainings
        after = chance.uniform(0, seconds) if number < kills else _LONGEST
        status = _status(pid, after)
        if status is None:
            sent = chance.choice(SIGNALS) if number < kills else signal.SIGKILL
            together = chance.random() < 0.5  # Ctrl-C in a terminal reaches the workers too
            (os.killpg if together else os.kill)(pid, sent)
            status = _status(pid, _LONGEST)
            outcome.kills.append((f"{sent.name}{' to all' * together}", after, -999 if status is None else status))
            if status is None:
                os.killpg(pid, signal.SIGKILL)
                _status(pid, 60)
            accepted = {0, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT}
        else:
            accepted = {0}
        said = (folder / "stderr.txt").read_text(errors="replace")
        if status not in accepted or "Traceback" in said:
            last = outcome.kills[-1:] if status is None or number < kills else []
            outcome.failures.append(f"start {number} {last} exited with {status}: {said[-3000:]}")
        if status == 0:
            break
    return outcome


def differences(folder: Path, expected: Path) -> list[str]:
    """In which files the results differ from those of a command that was never stopped; none if all are the same."""
    names, others = ({path.relative_to(of).as_posix() for path in of.rglob("*")} for of in (folder, expected))
    found = [f"{name} is {'not there' if name in others else 'too much'}" for name in sorted(names ^ others)]
    for name in sorted(names & others):
        path, other = folder / name, expected / name
        if path.is_file() and _content(path) != _content(other):
            found.append(f"{name} differs")
    return found


def _content(path: Path) -> object:
    """What must be the same: everything, but for times and for what says how often it was started."""
    if path.name == "results.csv":
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: text for name, text in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    if path.name == "provenance.json":
        origin = json.loads(path.read_text(encoding="utf-8"))
        return {name: value for name, value in origin.items() if name != "continued"}
    return path.read_bytes()


def main() -> int:
    """Kill runs in several folders, one after the other, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="new folder for everything")
    parser.add_argument("--folders", type=int, default=30)
    parser.add_argument("--kills", type=int, default=10, help="most kills of a folder")
    parser.add_argument("--within", type=float, default=0.7, help="share of the time of a whole run, in which to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--start", choices=["forked", "command"], default="forked")
    options = parser.parse_args()
    start = start_forked if options.start == "forked" else start_command
    chance = random.Random(options.seed)
    whole: dict[str, float] = {}
    total = failed = 0
    for number in range(options.folders):
        name, every = chance.choice(options.commands), chance.randint(1, 4)
        workers = chance.choice(options.workers)
        expected = options.folder / f"whole-{name}-{every}-{workers}"
        arguments = command(name, every, workers)
        if expected.name not in whole:
            whole[expected.name] = undisturbed(arguments, expected, start)
        folder = options.folder / f"{number:03d}-{name}-{every}-{workers}"
        outcome = disturbed(arguments, folder, start, kills=options.kills,
                            seconds=options.within * whole[expected.name], chance=chance)  # fmt: skip
        outcome.failures += differences(folder / "out", expected / "out")
        total, failed = total + len(outcome.kills), failed + bool(outcome.failures)
        print(f"{folder.name}: {len(outcome.kills)} kills {outcome.kills}", *outcome.failures, sep="\n  ", flush=True)
        print(f"{number + 1} folders, {total} kills, {failed} folders wrong", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
