"""A callback of Hugging Face's Trainer: limits by the length of the training, and the example weight after it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.hub import cached_file

from ..conversion.convert import convert
from ..conversion.recipe import recipe
from ..files import replace_file
from ..modules import norms
from .training import LimitsAndWeight, random_numbers_kept, require_one_process

Model = TypeVar("Model", bound=nn.Module)

_FILE = "renorm.json"


def store(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the settings of a model's norm layers beside its files, into renorm.json.

    `save_pretrained` and `Trainer.save_model` do not: call this after them. `RenormCallback` does it for the trainer's
    checkpoints, and at the end of a training for its output folder.

    Args:
        model: with layers of renorm.
        folder: of the model's files.

    Raises:
        OSError: it cannot be written; an older file stays as it was.

    Example:
        >>> from tempfile import mkdtemp
        >>> import renorm
        >>> store(nn.Sequential(renorm.BatchRenorm1d(3)), folder := mkdtemp())
        >>> type(restore(nn.Sequential(nn.BatchNorm1d(3)), folder)[0]).__name__
        'BatchRenorm1d'
    """
    text = json.dumps(recipe(model), indent=2)
    replace_file(Path(folder, _FILE), lambda path: path.write_text(text, encoding="utf-8"))


def restore(model: Model, folder: str | os.PathLike[str], **options: Any) -> Model:
    """Make a model's norm layers what they were when it was stored, in place.

    `from_pretrained` builds a model with its own batch norm and loads the state dict of ours; this converts it, with
    limits, momentum, example weights and the rest.

    Args:
        model: of `from_pretrained`.
        folder: with renorm.json, or a repository's name, as `from_pretrained` takes it.
        **options: of transformers' `cached_file`, as `revision` and `token`.

    Returns:
        The model.

    Raises:
        OSError: there is no such file.
        ValueError: a layer cannot become what it was; see `renorm.convert`.

    Example:
        >>> model = restore(ResNetForImageClassification.from_pretrained("folder"), "folder")  # doctest: +SKIP
    """
    file = cached_file(folder, _FILE, **options)
    assert file is not None
    convert(model, json.loads(Path(file).read_text(encoding="utf-8")))
    return model


class RenormCallback(LimitsAndWeight, TrainerCallback):
    """Sets the limits when training begins, and chooses the example weight when it ends.

    The limits are those of all layers that have some. With `load_best_model_at_end` it is the best model that is
    weighed. Settings, which a saved model does not hold (example weights, limits, momentum, groups), are written into
    renorm.json in each checkpoint's folder and, at the end, in the output folder; `restore` applies them after
    `from_pretrained`.

    Args:
        limits: from the number of training batches, micro-batches included, or with `accumulate` of optimizer steps,
            to limits; None to leave them. A momentum that was that of the layer's old limits becomes
            `limits.momentum`.
        weigh: from the model and the dataloader of the last evaluation to example weights, as `renorm.weigh`, which
            passes over all of it; with options by `functools.partial`. None for not. Needs an `eval_strategy`. It is
            tried before the training, on a batch of an evaluation before it or, where there was none, of the training
            data.
        accumulate: whether the micro-batches of an optimizer step (`gradient_accumulation_steps`) move the running
            statistics once, as in `renorm.accumulate`. A training that was interrupted in the middle of a step leaves
            the model waiting for its end: `callback.drop_block()`, or another training, ends that.

    Attributes:
        weighing: what `weigh` returned; None before.

    Example:
        >>> import renorm
        >>> callback = RenormCallback(weigh=renorm.weigh)
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Try to weigh, and set the limits.

        Raises:
            ValueError: there are no limits to set, the model cannot be weighed after the training, or micro-batches
                cannot be accumulated.
        """
        model = kwargs["model"]
        if self.weigh is not None:
            require_one_process(args.world_size)
            if args.eval_strategy == "no":
                raise ValueError("weigh needs the evaluation dataloader: set eval_strategy, or give weigh=None")
            known, training = kwargs["eval_dataloader"], kwargs["train_dataloader"]
            with random_numbers_kept(model):
                batches = _beginning_of(training if known is None else known, args.per_device_eval_batch_size)
            if batches:
                self.try_weighing(model, batches)
        self.prepare(model, state.max_steps, args.gradient_accumulation_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to merge the micro-batches of a step."""
        self.open_block(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the running statistics by the step's micro-batches."""
        self.close_block()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the settings into the checkpoint's folder."""
        folder = Path(_output(args), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if args.should_save and folder.is_dir():  # a search for hyperparameters has other folders
            store(kwargs["model"], folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the example weight, and write the settings into the output folder.

        Warns:
            UserWarning: no evaluation ran, so there is no dataloader to choose it on, or that failed.
        """
        self.drop_block()
        if self.weigh is not None:
            self._weigh(kwargs["model"], kwargs["eval_dataloader"])
        if args.should_save and norms(kwargs["model"]):
            _output(args).mkdir(parents=True, exist_ok=True)
            store(kwargs["model"], _output(args))

    def _weigh(self, model: nn.Module, loader: Any) -> None:
        if loader is None:
            warnings.warn(
                "weigh needs the dataloader of an evaluation, and none ran in this training: example weights are as "
                "they were; call renorm.weigh(model, loader), or evaluate earlier (eval_steps, eval_delay)",
                stacklevel=3,
            )
        else:
            self.weigh_at_the_end(model, loader)


def _output(args: TrainingArguments) -> Path:
    assert args.output_dir is not None  # "trainer_output" if none is given
    return Path(args.output_dir)


def _beginning_of(loader: Any, examples: int) -> Sequence[Any]:
    """The first examples as a batch; none where data cannot be indexed.

    Not by iterating: accelerate's loaders take note of that. Before its first evaluation the trainer has only the
    training data for callbacks.
    """
    data = loader.dataset
    if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return []
    return [loader.collate_fn([data[i] for i in range(min(examples, len(data)))])]
