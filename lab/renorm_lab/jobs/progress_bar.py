"""The progress bar: runs, epochs and time left."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..runs import Run
from ..terminal import console


class RunProgress:
    """A bar for all steps of all runs, and a line for each run that is under way.

    Args:
        runs: the runs to carry out.
        finished: number of runs that were finished before.
        epoch_steps: steps of an epoch of each run.
        visible: whether anything is shown.
    """

    def __init__(self, runs: Sequence[Run], finished: int, epoch_steps: Sequence[int], *, visible: bool = True) -> None:
        self._runs = runs
        self._before = finished
        self._epoch_steps = epoch_steps
        self._shown = [0] * len(runs)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console(stderr=True),
            transient=True,
            disable=not visible,
        )
        self._total = self._progress.add_task("", total=sum(run.steps for run in runs))
        self._lines = [self._progress.add_task("", total=run.steps, visible=False) for run in runs]

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, steps_done: Sequence[int]) -> None:
        """Bring the bar up to date.

        Args:
            steps_done: steps done of each run.
        """
        finished = self._before
        lines = zip(self._runs, self._lines, steps_done, self._epoch_steps, strict=True)
        for index, (run, line, steps, epoch) in enumerate(lines):
            finished += steps == run.steps
            if steps == self._shown[index]:
                continue
            self._shown[index] = steps
            text = f"  {run}: epoch {-(-steps // epoch)} of {-(-run.steps // epoch)}"
            self._progress.update(line, description=text, completed=steps, visible=0 < steps < run.steps)
        total = self._before + len(self._runs)
        self._progress.update(self._total, description=f"{finished} of {total} runs", completed=sum(steps_done))
