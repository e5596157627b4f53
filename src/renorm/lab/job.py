"""A recipe from beginning to end: data, checks, runs, report."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial

import torch
from rich.console import Console

from .batches import batch_sampler
from .data import Dataset, load_dataset
from .errors import LabError
from .execution import run_here, run_in_processes
from .methods import norm_factory
from .models import build_model
from .plots import plot_bars, plot_curves
from .progress import RunProgress
from .recipe import Recipe
from .runs import Result, Run
from .store import Results, open_folder, read_results, replace_text, write_results
from .summary import markdown_table, summarize, terminal_table


def carry_out(recipe: Recipe, command: str) -> None:
    """Carry out a recipe, or what is missing of it, and write and print its report.

    Args:
        recipe: the recipe with its options.
        command: the command line, for command.txt.

    Raises:
        LabError: data, options or the output folder are wrong, or a run failed.
        KeyboardInterrupt: from outside; finished runs are kept.
    """
    load = partial(load_dataset, recipe.data, recipe.data_root, recipe.image_size)
    dataset = load()
    runs = recipe.runs(dataset)
    _check(runs, dataset, recipe)
    open_folder(recipe.folder, {"recipe": recipe.name} | asdict(recipe), command)
    results = read_results(recipe.folder, runs)
    missing = [run for run in runs if run not in results]

    def keep(run: Run, result: Result) -> None:
        results[run] = result
        write_results(recipe.folder, _in_order(results, runs))

    epoch_steps = [len(batch_sampler(run, dataset.train)) for run in missing]
    workers = min(recipe.workers or os.cpu_count() or 1, len(missing))
    with RunProgress(missing, len(results), epoch_steps) as progress:
        if workers > 1 and recipe.device == "cpu":
            run_in_processes(missing, load, workers, keep, progress.show)
        else:
            run_here(missing, dataset.to(recipe.device), keep, progress.show)
    _report(recipe, _in_order(results, runs))


def _check(runs: list[Run], dataset: Dataset, recipe: Recipe) -> None:
    if not runs or len({run.key for run in runs}) < len(runs):
        raise LabError("options that are lists must have at least one element, and none of them twice")
    try:
        torch.empty(0, device=recipe.device)
    except (RuntimeError, AssertionError) as error:
        raise LabError(f"device {recipe.device} cannot be used: {str(error).splitlines()[0]}") from None
    for run in runs:
        try:
            batch_sampler(run, dataset.train)
            build_model(run.model, dataset.image_shape, dataset.num_classes, norm_factory(run))
        except ValueError as error:
            raise LabError(f"{dataset.source}: {run}: {error}") from None


def _in_order(results: Results, runs: list[Run]) -> Results:
    return {run: results[run] for run in runs if run in results}


def _report(recipe: Recipe, results: Results) -> None:
    summary = summarize(results)
    title = f"{recipe.title}: {next(iter(results)).model} on {recipe.data}"
    replace_text(recipe.folder / "table.md", f"# {title}\n\n{markdown_table(summary)}")
    plot_bars(recipe.folder / "bars.png", summary, title)
    plot_curves(recipe.folder / "curves.png", results, summary, title)
    console = Console()
    console.print(terminal_table(summary, title))
    console.print(f"Everything is in {recipe.folder}")
