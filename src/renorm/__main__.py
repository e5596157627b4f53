"""The command line of the library: `python -m renorm doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .doctor import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; by default those of the process.

    Returns:
        The exit status: 0, or 1 if something does not work.
    """
    parser = argparse.ArgumentParser(
        prog="python -m renorm",
        description="Batch normalization that means the same thing in training and at inference.",
        epilog="Experiments come with the lab: pip install . ./lab in a checkout, then renorm --help.",
    )
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    commands.add_parser("doctor", help="say whether this installation works, what it computes with, and why")
    if parser.parse_args(arguments).command is None:
        parser.print_help()
        return 0
    return 0 if doctor() else 1


if __name__ == "__main__":
    sys.exit(main())
