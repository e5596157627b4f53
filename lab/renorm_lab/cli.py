"""The command line: `renorm run RECIPE`, `renorm list`, `renorm report FOLDER...` and `renorm inspect MODEL`."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from .errors import LabError
from .inspect_command import inspect_model
from .jobs.job import carry_out
from .recipe import Scale
from .recipes import RECIPES
from .report.page import report
from .store import read_settings
from .terminal import write_any_letter

_INTERRUPTED = 130  # what shells expect after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; by default those of the process.

    Returns:
        The exit status: 0, 1 for an error, 130 for an interrupt.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    write_any_letter()
    try:
        _carry_out(arguments)
        sys.stdout.flush()
    except LabError as error:
        return _failed(error)
    except BrokenPipeError:  # a reader, as head, that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
        return 1
    except (OSError, MemoryError) as error:  # what files and machines may do anywhere
        return _failed(LabError(str(error) or "there is not enough memory"))
    except RecursionError:
        return _failed(LabError("an option, or a file of options, is nested too deeply"))
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _failed(error: LabError) -> int:
    print(f"renorm: error: {error}", file=sys.stderr)
    return 1


def _carry_out(arguments: list[str]) -> None:
    scale, last = _scale(arguments)
    options = _parser(scale).parse_args([_with(argument, "-", "_") for argument in [*arguments, *last]])
    if options.command == "list":
        print(_recipe_list())
    elif options.command == "inspect":
        inspect_model(**options.inspect.as_dict())
    elif options.command == "report":
        report(**options.report.as_dict())
    else:
        _run(options.run, shlex.join(["renorm", *arguments]))


def _run(options: Namespace, command: str) -> None:
    recipe = RECIPES[options.recipe](**_fields(options[options.recipe]))
    try:
        carry_out(recipe, command)
    except KeyboardInterrupt:
        print(f"Interrupted. Finished runs are in {recipe.folder}; the same command continues.", file=sys.stderr)
        raise


def _fields(options: Namespace) -> dict[str, Any]:
    return {name: value for name, value in options.as_dict().items() if name != "config"}


class _HelpFormatter(DefaultHelpFormatter):
    """Shows options as people write them; jsonargparse takes them from names in Python."""

    def format_help(self) -> str:
        return re.sub(r"--[a-z_]+", lambda option: _with(option[0], "_", "-"), super().format_help())


def _with(option: str, old: str, new: str) -> str:
    """--data-root and --data_root are the same option; its value, after "=", stays as it is."""
    if not option.startswith("--"):
        return option
    name, equals, value = option[2:].partition("=")
    return f"--{name.replace(old, new)}{equals}{value}"


def _scale(arguments: Sequence[str]) -> tuple[Scale | None, list[str]]:
    """The scale that is asked for, whose defaults the other options, and --help, go by.

    Returns:
        The scale, and arguments to add, so that the command line's scale wins over that of a --config after it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--scale", choices=get_args(Scale))
    parser.add_argument("--config", type=Path)
    try:
        known = parser.parse_known_args(arguments)[0]
        if known.scale is not None:
            return known.scale, [f"--scale={known.scale}"]
    except argparse.ArgumentError:
        return None, []  # the parser that knows all options says what is wrong
    scale = None if known.config is None else read_settings(known.config).get("scale")
    return scale if scale in get_args(Scale) else None, []


def _parser(scale: Scale | None) -> ArgumentParser:
    # Parsers of commands take over the formatter.
    description = "Experiments with normalization layers, and a look at those of a model."
    epilog = "The library's own: renorm doctor says whether this installation works; renorm --version."
    parser = ArgumentParser(prog="renorm", description=description, epilog=epilog, formatter_class=_HelpFormatter)
    commands = parser.add_subcommands(dest="command", title="commands", metavar="COMMAND")
    run = ArgumentParser(description="Train, evaluate and report; an interrupted job continues where it was.")
    commands.add_subcommand("run", run, help="run a recipe")
    commands.add_subcommand("list", ArgumentParser(description="List the recipes."), help="list the recipes")
    looking = ArgumentParser(description=_description(inspect_model))
    looking.add_function_arguments(inspect_model, as_group=False, as_positional=True)
    commands.add_subcommand("inspect", looking, help="look at a trained model's norm layers")
    reporting = ArgumentParser(description=_description(report))
    reporting.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what `renorm run` wrote")
    reporting.add_function_arguments(report, as_group=False, skip={"folders"})
    commands.add_subcommand("report", reporting, help="compare results with the papers' claims")
    recipes = run.add_subcommands(dest="recipe", title="recipes", metavar="RECIPE")
    for name, recipe in RECIPES.items():
        options = ArgumentParser(description=_description(recipe))
        options.add_argument(
            "--config", action="config", help="YAML file of options, such as an earlier run's config.yaml"
        )
        options.add_class_arguments(recipe, as_group=False)
        if scale is not None:
            options.set_defaults({"scale": scale, **recipe.scales[scale]})
        recipes.add_subcommand(name, options, help=recipe.title)
    return parser


def _description(documented: object) -> str:
    return (documented.__doc__ or "").partition("Args:")[0].strip()


def _recipe_list() -> str:
    width = max(map(len, RECIPES)) + 2
    return "\n".join(
        f"{name:<{width}}{recipe.title}\n{'':<{width}}{recipe.source}: {recipe.claim}"
        for name, recipe in RECIPES.items()
    )
