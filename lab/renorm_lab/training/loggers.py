"""Numbers of a training for TensorBoard, or whatever Lightning has a logger for."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from renorm.integrations.monitor import monitor

from ..errors import LabError
from ..recipe import LoggerName, Recipe
from ..runs import CurvePoint, Run
from ..store import file_stem

_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
_POINTS = 100  # of the loss during a training


def check_logger(recipe: Recipe) -> None:
    """Refuse a logger whose package is not installed; say it of TensorBoard, which is the default.

    Args:
        recipe: the recipe with its options.

    Raises:
        LabError: the package is missing.
    """
    package = _missing_package(recipe.logger)
    if package == "tensorboard":
        print("renorm: TensorBoard is not installed: the curves are in curves.csv alone", file=sys.stderr)
    elif package is not None:
        raise LabError(f"logger {recipe.logger} needs the package {package}, which is not installed")


class Log:
    """The log of a training.

    Args:
        recipe: says which logger, and where.
        run: the run.
        step: steps that were trained before.
        model: the network; r, d and the gap of its norm layers are logged too.
        writes: whether this process writes it: of several ranks one does.
    """

    def __init__(self, recipe: Recipe, run: Run, step: int, model: nn.Module, *, writes: bool) -> None:
        writes = writes and _missing_package(recipe.logger) is None
        self._logger = _make_logger(recipe, run, step) if writes else None
        self._name = recipe.logger
        self._every = max(1, run.steps // _POINTS)
        self._monitor = None if self._logger is None else monitor(model, self._every)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._monitor is not None:
            self._monitor.close()
        if self._logger is not None:
            self._logger.finalize("success" if error is None else "aborted")
            if self._name == "wandb":  # whose next logger would go on with the run that is open
                importlib.import_module("wandb").finish(exit_code=int(error is not None))

    def step(self, step: int, loss: Tensor, lr: float) -> None:
        """Log a training step, if it is the time for it.

        Args:
            step: steps done.
            loss: of this rank, 0-d.
            lr: learning rate of the next step.
        """
        if self._logger is None or self._monitor is None or step % self._every:
            return
        numbers = {"train/loss": float(loss), "train/learning_rate": lr}
        self._logger.log_metrics(numbers | self._monitor.compute(), step)

    def point(self, point: CurvePoint) -> None:
        """Log a point of the curve.

        Args:
            point: the point.
        """
        if self._logger is not None:
            self._logger.log_metrics({"validation/accuracy": point.validation_accuracy}, point.step)


def _missing_package(name: LoggerName) -> str | None:
    package = _PACKAGES.get(name)
    return package if package is not None and find_spec(package) is None else None


def _make_logger(recipe: Recipe, run: Run, step: int) -> Any:
    folder, name = recipe.folder / "logs", file_stem(run)
    if recipe.logger == "tensorboard":
        from lightning.fabric.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(folder, name, version="", purge_step=step + 1)
    if recipe.logger == "csv":
        from lightning.fabric.loggers.csv_logs import CSVLogger

        return CSVLogger(folder, name, version=f"from-step-{step}")  # an older file would be overwritten
    if recipe.logger == "mlflow":
        from lightning.pytorch.loggers import MLFlowLogger

        return MLFlowLogger(recipe.name, str(run), save_dir=str(folder))
    if recipe.logger == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(str(run), folder, project=f"renorm-{recipe.name}")
    return None
