"""The command line: `renorm run RECIPE`, `renorm list` and `renorm inspect MODEL`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from .errors import LabError
from .inspection import inspect_model
from .job import carry_out
from .recipes import RECIPES

_INTERRUPTED = 130  # what shells expect after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; by default those of the process.

    Returns:
        The exit status: 0, 1 for an error, 130 for an interrupt.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args([_with(argument, "-", "_") for argument in arguments])
    if options.command == "list":
        print(_recipe_list())
        return 0
    try:
        if options.command == "inspect":
            inspect_model(**options.inspect.as_dict())
            return 0
        return _run(options.run, shlex.join(["renorm", *arguments]))
    except LabError as error:
        print(f"renorm: error: {error}", file=sys.stderr)
        return 1


def _run(options: Namespace, command: str) -> int:
    recipe = RECIPES[options.recipe](**options[options.recipe].as_dict())
    try:
        carry_out(recipe, command)
    except KeyboardInterrupt:
        print(f"Interrupted. Finished runs are in {recipe.folder}; the same command continues.", file=sys.stderr)
        return _INTERRUPTED
    return 0


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


def _parser() -> ArgumentParser:
    # Parsers of commands take over the formatter.
    description = "Experiments with normalization layers, and a look at those of a model."
    parser = ArgumentParser(prog="renorm", description=description, formatter_class=_HelpFormatter)
    commands = parser.add_subcommands(dest="command", title="commands", metavar="COMMAND")
    run = ArgumentParser(description="Train, evaluate and report; an interrupted job continues where it was.")
    commands.add_subcommand("run", run, help="run a recipe")
    commands.add_subcommand("list", ArgumentParser(description="List the recipes."), help="list the recipes")
    looking = ArgumentParser(description=_description(inspect_model))
    looking.add_function_arguments(inspect_model, as_group=False, as_positional=True)
    commands.add_subcommand("inspect", looking, help="look at a trained model's norm layers")
    recipes = run.add_subcommands(dest="recipe", title="recipes", metavar="RECIPE")
    for name, recipe in RECIPES.items():
        options = ArgumentParser(description=_description(recipe))
        options.add_class_arguments(recipe, as_group=False)
        recipes.add_subcommand(name, options, help=recipe.title)
    return parser


def _description(documented: object) -> str:
    return (documented.__doc__ or "").partition("Args:")[0].strip()


def _recipe_list() -> str:
    return "\n".join(f"{name:<12}{recipe.title}" for name, recipe in RECIPES.items())
