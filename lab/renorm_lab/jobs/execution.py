"""Carrying out runs: one after the other in this process, or side by side in several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from ..data import Dataset
from ..errors import LabError
from ..recipe import Recipe
from ..runs import Result, Run
from ..training.train import train
from .interrupts import deferring_interrupts
from .memory import return_memory
from .worker import start_worker, train_in_worker

Keep = Callable[[Run, Result], None]
Show = Callable[[Sequence[int]], None]

_POLL_SECONDS = 0.1


def run_here(runs: Sequence[Run], dataset: Dataset, recipe: Recipe, keep: Keep, show: Show) -> None:
    """Carry out runs one after the other in this process, with one thread, so that results are those of workers.

    Args:
        runs: the runs.
        dataset: the data, on the device to train on.
        recipe: how to carry them out.
        keep: called with each finished run and its result.
        show: called after each step with the number of steps done of each run; may raise to stop.

    Raises:
        LabError: a run failed.
    """
    steps_done = [0] * len(runs)
    for index, run in enumerate(runs):

        def progress(step: int, index: int = index) -> None:
            steps_done[index] = step
            show(steps_done)

        with _naming(run), _one_thread():
            result = train(run, dataset, recipe, progress)
            return_memory()
        keep(run, result)


def run_in_processes(runs: Sequence[Run], recipe: Recipe, workers: int, keep: Keep, show: Show) -> None:
    """Carry out runs side by side in processes of one thread each, which is what small networks use best.

    An interrupt reaches this process alone, which then stops the workers at their next step.

    Args:
        runs: the runs.
        recipe: how to carry them out; its data are loaded in each worker.
        workers: number of processes.
        keep: called in this process with each finished run and its result.
        show: called in this process several times a second with the number of steps done of each run; may raise to
            stop.

    Raises:
        LabError: a run failed, or a worker died.
    """
    context = multiprocessing.get_context("spawn")
    steps_done = context.RawArray("q", len(runs))  # plain shared memory: no lock that a dying worker could keep
    stop = context.RawValue("b", 0)
    waiting: dict[Future[Result], int] = {}
    with ProcessPoolExecutor(workers, context, start_worker, (recipe, steps_done, stop)) as pool:
        try:
            with deferring_interrupts():  # as the workers, which start here, always do
                waiting |= {pool.submit(train_in_worker, run, index): index for index, run in enumerate(runs)}
            while waiting:
                finished, _ = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                show(steps_done)
                for future in sorted(finished, key=_has_failed):  # what succeeded is kept first
                    _keep_finished(future, runs[waiting[future]], keep)
                    del waiting[future]
        except BrokenProcessPool:
            show(steps_done)  # raises if workers were stopped together with this process
            underway = [str(runs[index]) for index in waiting.values() if steps_done[index]]
            raise LabError(f"a worker process died (out of memory?) during {_one_of(underway)}") from None
        finally:
            stop.value = 1
            pool.shutdown(cancel_futures=True)
            for future, index in waiting.items():
                if not _has_failed(future):
                    keep(runs[index], future.result())


def _has_failed(future: Future[Result]) -> bool:
    return future.cancelled() or future.exception() is not None


def _keep_finished(future: Future[Result], run: Run, keep: Keep) -> None:
    with _naming(run):
        result = future.result()
    keep(run, result)


@contextmanager
def _naming(run: Run) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:  # says nothing about this run
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise LabError(f"{run}: {error}") from error


def _one_of(names: Iterable[str]) -> str:
    return "; or ".join(names) or "its start"


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
