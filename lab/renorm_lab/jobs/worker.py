"""What happens inside a worker process."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import MutableSequence
from ctypes import c_byte
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch

from ..data import Dataset
from ..recipe import Recipe
from ..runs import Result, Run
from ..training.train import train
from .memory import return_memory


class _Worker(NamedTuple):
    dataset: Dataset
    recipe: Recipe
    steps_done: MutableSequence[int]
    stop: c_byte


_worker: _Worker | None = None


class StoppedError(Exception):
    """The parent process wants no further step."""


def start_worker(recipe: Recipe, steps_done: MutableSequence[int], stop: c_byte) -> None:
    """Prepare this process for runs.

    Args:
        recipe: how to carry runs out; its data are loaded.
        steps_done: shared with the parent, steps done of each run.
        stop: shared with the parent, not 0 once this process must stop.
    """
    global _worker
    parent = multiprocessing.parent_process()
    if parent is not None:
        if not parent.is_alive():  # while this process was starting
            os._exit(1)
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    _worker = _Worker(recipe.load(), recipe, steps_done, stop)


def train_in_worker(run: Run, index: int) -> Result:
    """Carry out a run in a prepared process.

    Args:
        run: the run.
        index: its place in the shared `steps_done`.

    Returns:
        The result.

    Raises:
        StoppedError: the parent process said so.
    """
    assert _worker is not None, "start_worker comes first"
    dataset, recipe, steps_done, stop = _worker

    def progress(step: int) -> None:
        steps_done[index] = step
        if stop.value:
            raise StoppedError

    result = train(run, dataset, recipe, progress)
    return_memory()
    return result


def _die_with(parent: BaseProcess) -> None:
    parent.join()  # a killed parent cannot tell its workers to stop
    os._exit(1)
