"""A Lightning callback: limits by the length of the training, and the example weight after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..inference.weigh import weigh
from ..modules import norms
from .training import LimitsAndWeight, require_one_process, set_limits

_KEY = "renorm_example_weights"


class RenormCallback(LimitsAndWeight, Callback):
    """Sets the limits when fit begins, and chooses the example weight when training ends.

    The limits are those of all layers that have some. Example weights, which a state dict does not hold, are kept in
    the trainer's checkpoints and set again where a trainer with this callback loads one. An average of the weights is
    Lightning's own: put `EMAWeightAveraging` before this callback, and the average is what is weighed.

    Args:
        limits: from the number of training batches, micro-batches included, to limits; None to leave them. A
            momentum that was that of the layer's old limits becomes `limits.momentum`.
        weigh: from the model and the first validation dataloader to example weights, as `renorm.weigh`, which passes
            over all of it; with options by `functools.partial`. None for not. The model's forward must take the input
            of a batch.

    Attributes:
        weighing: what `weigh` returned; None before.

    Example:
        >>> from functools import partial
        >>> import renorm
        >>> callback = RenormCallback(partial(renorm.Limits.over, r_max=2.0), weigh=renorm.weigh)
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the limits.

        Raises:
            ValueError: there are no limits to set, the length of the training is not known, or the model cannot be
                weighed after it.
        """
        if self.weigh is not None:
            require_one_process(trainer.world_size)
            if not trainer.enable_validation:
                raise ValueError("weigh needs a validation dataloader and a validation_step: give both, or weigh=None")
            if self._calls_forward() and type(pl_module).forward is LightningModule.forward:
                raise ValueError(
                    f"weigh calls the module's forward, which {type(pl_module).__name__} does not define: define it, "
                    "give partial(renorm.weigh, forward=...) a function of module and batch, or weigh=None"
                )
        if self.limits is not None:
            batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
            set_limits(pl_module, self.limits, batches)

    def _calls_forward(self) -> bool:
        """Whether it is `renorm.weigh` without a forward of the user's."""
        return getattr(self.weigh, "func", self.weigh) is weigh and "forward" not in getattr(self.weigh, "keywords", {})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the example weight."""
        if self.weigh is not None:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()  # where no validation has been
            self.weighing = self.weigh(pl_module, _first(trainer.val_dataloaders))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the example weights."""
        checkpoint[_KEY] = {name: layer.example_weight for name, layer in norms(pl_module).items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the example weights that were kept."""
        weights = checkpoint.get(_KEY, {})
        for name, layer in norms(pl_module).items():
            layer.example_weight = weights.get(name, layer.example_weight)


def _first(loaders: Any) -> Any:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders
