"""A recipe from beginning to end: data, checks, runs, report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

import torch

from renorm.markup import printable

from ..data import Dataset
from ..errors import LabError
from ..networks.network import make_network
from ..recipe import Recipe
from ..report.plots import plot_bars, plot_curves
from ..results import Results, read_finished, write_results
from ..runs import Result, Run
from ..store import file_stem, save_text, sole_writer
from ..summary import markdown_table, markdown_text, summarize, terminal_table
from ..terminal import console
from ..training.batches import batch_sampler
from ..training.checkpoints import Checkpoints
from ..training.loggers import check_logger
from ..training.ranks import make_fabric, share_of
from .execution import run_here, run_in_processes
from .interrupts import hearing_interrupts
from .progress_bar import RunProgress
from .provenance import check_folder, write_origin

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Value = TypeVar("Value")


def carry_out(recipe: Recipe, command: str) -> None:
    """Carry out a recipe, or what is missing of it, and write and print its report.

    Under torchrun all ranks call this, and train each run together; rank 0 alone writes.

    Args:
        recipe: the recipe with its options.
        command: the command line, for command.txt.

    Raises:
        LabError: data, options or the output folder are wrong, or a run failed.
        KeyboardInterrupt: from outside, by Ctrl-C or SIGTERM; the same call continues.
    """
    fabric = make_fabric(recipe.device)
    dataset = _load(recipe, fabric)
    runs = recipe.runs(dataset)
    _check(runs, dataset, recipe, fabric.world_size)
    with ExitStack() as stack:
        results = _begin(recipe, runs, command, fabric, stack)
        with hearing_interrupts() as stop_if_heard:
            _run_missing(recipe, runs, results, dataset, fabric, stop_if_heard)
            if fabric.is_global_zero:
                shutil.rmtree(recipe.folder / "checkpoints", ignore_errors=True)  # of processes that were killed
                _report(recipe, _in_order(results, runs), stop_if_heard)


def _load(recipe: Recipe, fabric: Fabric) -> Dataset:
    """The data, on rank 0 first, which may have to download them; an error waits until no rank waits for another."""
    loaded: Dataset | LabError
    with fabric.rank_zero_first():
        try:
            loaded = recipe.load()
        except LabError as error:
            loaded = error
    return _unless_error(loaded)


def _begin(recipe: Recipe, runs: list[Run], command: str, fabric: Fabric, stack: ExitStack) -> Results:
    """What is finished already; rank 0 looks and writes where the results come from, and all ranks hear of it.

    Until the stack is closed the folder is rank 0's alone.
    """
    finished: Results | LabError = {}
    if fabric.is_global_zero:
        try:
            stack.enter_context(sole_writer(recipe.folder))
            check_folder(recipe)
            finished = read_finished(recipe.folder, runs)
            if len(finished) < len(runs):
                write_origin(recipe, command, fabric.world_size)
        except LabError as error:
            finished = error
    return _unless_error(fabric.broadcast(finished))


def _unless_error(value: Value | LabError) -> Value:
    if isinstance(value, LabError):
        raise value
    return value


def _run_missing(
    recipe: Recipe,
    runs: list[Run],
    results: Results,
    dataset: Dataset,
    fabric: Fabric,
    stop_if_heard: Callable[[], None],
) -> None:
    missing = [run for run in runs if run not in results]

    def keep(run: Run, result: Result) -> None:
        results[run] = result
        if fabric.is_global_zero:
            write_results(recipe.folder, _in_order(results, runs))
            Checkpoints(recipe.folder, run).remove()

    epoch_steps = [len(batch_sampler(run, dataset.train)) for run in missing]
    workers = min(recipe.workers or os.cpu_count() or 1, len(missing))
    with RunProgress(missing, len(results), epoch_steps, visible=fabric.is_global_zero) as progress:

        def show(steps_done: Sequence[int]) -> None:
            progress.show(steps_done)
            stop_if_heard()

        if workers > 1 and recipe.device == "cpu" and fabric.world_size == 1:
            run_in_processes(missing, recipe, workers, keep, show)
        elif missing:
            run_here(missing, dataset.to(fabric.device), recipe, keep, show)


def _check(runs: list[Run], dataset: Dataset, recipe: Recipe, processes: int) -> None:
    if not runs:
        raise LabError("options that are lists (as --methods) must have at least one element")
    _check_distinct(runs)
    check_logger(recipe)
    for run in runs:
        share_of(run, processes)
        try:
            batch_sampler(run, dataset.train)
            with torch.device("meta"):  # shapes are checked, and weights take no time
                make_network(run, dataset)
        except ValueError as error:
            raise LabError(f"{dataset.source}: {run}: {error}") from None


def _check_distinct(runs: list[Run]) -> None:
    by_stem: dict[str, Run] = {}
    for run in runs:
        other = by_stem.setdefault(file_stem(run), run)
        if other is run:
            continue
        if other.key == run.key:
            raise LabError(f"an option that is a list (as --methods) must name nothing twice, got twice: {run}")
        raise LabError(f"names must differ in more than punctuation, since files are named so, got {other}; {run}")


def _in_order(results: Results, runs: list[Run]) -> Results:
    return {run: results[run] for run in runs if run in results}


def _report(recipe: Recipe, results: Results, stop_if_heard: Callable[[], None]) -> None:
    summary = summarize(results, recipe.score, shows_training=recipe.shows_training)
    title = f"{recipe.title}: {next(iter(results)).model} on {recipe.data}"
    save_text(recipe.folder / "table.md", f"# {markdown_text(title)}\n\n{markdown_table(summary)}")
    plot_bars(recipe.folder / "bars.png", summary, title)
    stop_if_heard()
    plot_curves(recipe.folder / "curves.png", results, summary, title)
    stop_if_heard()
    terminal = console()
    terminal.print(terminal_table(summary, title))
    conclusion = recipe.conclusion(summary)
    if conclusion:
        terminal.print(conclusion)
    terminal.print(f"Everything is in {printable(str(recipe.folder))}")
