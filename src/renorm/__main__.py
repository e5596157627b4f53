"""The command `renorm`, also as `python -m renorm`: the library's part of it, and the lab's where that is installed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from . import __version__
from .doctor import doctor

_INTERRUPTED = 130  # what shells expect after Ctrl-C
_LAB = "pip install ./lab, in a checkout of the repository"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; by default those of the process.

    Returns:
        The exit status: 0, 1 if something does not work, 130 for an interrupt.
    """
    try:
        status = _carry_out(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # a reader, as head, that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _carry_out(arguments: list[str]) -> int:
    if arguments[:1] not in (["doctor"], ["--version"]):
        for others in entry_points(group="renorm.commands"):
            try:
                command = others.load()
            except ImportError as error:
                print(f"renorm: error: the lab is not complete ({error}): {_LAB}", file=sys.stderr)
                return 1
            status: int = command(arguments)
            return status
    parser = argparse.ArgumentParser(
        prog="renorm",
        description="Batch normalization that means the same thing in training and at inference.",
        epilog=f"The experiments, and a look at a model's layers (renorm run, inspect, report), are the lab's: {_LAB}.",
    )
    parser.add_argument("--version", action="version", version=f"renorm {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    commands.add_parser("doctor", help="say whether this installation works, what it computes with, and why")
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands.choices:
        parser.error(f"{arguments[0]} is no command of the library; the lab, which is not installed, has more: {_LAB}")
    if parser.parse_args(arguments).command is None:
        parser.print_help()
        return 0
    return 0 if doctor() else 1


if __name__ == "__main__":
    sys.exit(main())
