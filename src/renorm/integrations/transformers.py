"""A callback of Hugging Face's Trainer: limits by the length of the training, and the example weight after it."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .training import LimitsAndWeight, require_one_process, set_limits


class RenormCallback(LimitsAndWeight, TrainerCallback):
    """Sets the limits when training begins, and chooses the example weight when it ends.

    The limits are those of all layers that have some. With `load_best_model_at_end` it is the best model that is
    weighed. A state dict, so also a saved model, does not hold example weights: `weighing.alphas` has them by layer.

    Args:
        limits: from the number of training batches, micro-batches included, to limits; None to leave them. With ramps
            the momentum becomes at least `limits.momentum`, as by `renorm.convert`.
        weigh: from the model and the dataloader of the last evaluation to example weights, as `renorm.weigh`, which
            passes over all of it; with options by `functools.partial`. None for not. Needs an `eval_strategy`.

    Attributes:
        weighing: what `weigh` returned; None before.

    Example:
        >>> import renorm
        >>> callback = RenormCallback(weigh=renorm.weigh)
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the limits.

        Raises:
            ValueError: there are no limits to set, or the model cannot be weighed after the training.
        """
        if self.weigh is not None:
            require_one_process(args.world_size)
            if args.eval_strategy == "no":
                raise ValueError("weigh needs the evaluation dataloader: set eval_strategy, or give weigh=None")
        if self.limits is not None:
            set_limits(kwargs["model"], self.limits, state.max_steps * args.gradient_accumulation_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the example weight.

        Warns:
            UserWarning: no evaluation ran, so there is no dataloader to choose it on.
        """
        if self.weigh is None:
            return
        if kwargs["eval_dataloader"] is None:
            warnings.warn(
                "weigh needs the dataloader of an evaluation, and none ran in this training: example weights are as "
                "they were; call renorm.weigh(model, loader), or evaluate earlier (eval_steps, eval_delay)",
                stacklevel=2,
            )
            return
        self.weighing = self.weigh(kwargs["model"], kwargs["eval_dataloader"])
