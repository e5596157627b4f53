"""A Lightning callback: limits by the length of a training, the example weight after it, settings in checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..conversion.convert import convert
from ..conversion.recipe import missing_names, recipe
from ..modules import norms
from .training import LimitsAndWeight, require_one_process

_KEY = "renorm"


class RenormModule(LightningModule):
    """A LightningModule whose checkpoints hold the settings of its norm layers, and which takes them from there.

    So `load_from_checkpoint`, at which no callback is asked, and `ModelCheckpoint(save_weights_only=True)` keep limits,
    example weights and the rest. To be inherited from in the place of LightningModule, or before another base class;
    who overrides `on_save_checkpoint` or `on_load_checkpoint` calls super's. Norm layers may be as the module's
    constructor makes them, or converted later: then loading converts them too.

    Example:
        >>> import renorm
        >>> from torch import nn
        >>> class Classifier(RenormModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> checkpoint = {}
        >>> renorm.convert(Classifier(), renorm.BatchRenorm, example_weight=0.2).on_save_checkpoint(checkpoint)
        >>> again = Classifier()
        >>> again.on_load_checkpoint(checkpoint)
        >>> again.net[1].example_weight
        0.2
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the settings."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_KEY] = recipe(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Apply the settings that were kept, before Lightning loads the state dict."""
        super().on_load_checkpoint(checkpoint)
        restore(self, checkpoint)


def restore(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Make a module's norm layers what they were when a checkpoint was saved, in place.

    `RenormCallback` does so in a trainer, `RenormModule` wherever a checkpoint is loaded. Else, call it at the end of
    `on_load_checkpoint`.

    Args:
        module: as it was built, converted or not.
        checkpoint: of a trainer with `RenormCallback`, or of a `RenormModule`.

    Raises:
        ValueError: a layer cannot become what it was; see `renorm.convert`.

    Warns:
        UserWarning: the checkpoint holds no settings, though the module has layers of renorm, or those of layers that
            the module lacks.
    """
    kept = checkpoint.get(_KEY)
    if kept is None:
        if norms(module):
            warnings.warn(
                "checkpoint holds no settings of norm layers, which are as they were constructed (limits, momentum, "
                "example weights): save it by a RenormModule or a trainer with RenormCallback, or set them",
                stacklevel=2,
            )
        return
    missing = missing_names(module, kept)
    if missing:  # whether that is an error is a matter of load_state_dict's strict
        warnings.warn(
            f"checkpoint has settings of layers that the module lacks: {', '.join(missing)}; the others are restored",
            stacklevel=2,
        )
        kept = kept | {
            "layers": {name: settings for name, settings in kept["layers"].items() if name not in missing},
            "fused": [name for name in kept["fused"] if name not in missing],
        }
    convert(module, kept)


class RenormCallback(LimitsAndWeight, Callback):
    """Sets the limits when fit begins, and chooses the example weight when training ends.

    The limits are those of all layers that have some. Settings, which a state dict does not hold (example weights,
    limits, momentum, groups), are kept in the trainer's checkpoints and restored where a trainer with this callback
    loads one; for `load_from_checkpoint` see `RenormModule`. An average of the weights is Lightning's own: put
    `EMAWeightAveraging` before this callback, and the average is what is weighed.

    Args:
        limits: from the number of training batches, micro-batches included, or with `accumulate` of optimizer steps,
            to limits; None to leave them. A momentum that was that of the layer's old limits becomes
            `limits.momentum`.
        weigh: from the model and the first validation dataloader to example weights, as `renorm.weigh`, which passes
            over all of it; with options by `functools.partial`. None for not. The model's forward must take the input
            of a batch. It is tried on one batch before the training.
        accumulate: whether the micro-batches of an optimizer step (`accumulate_grad_batches`) move the running
            statistics once, as in `renorm.accumulate`. Not in manual optimization, where that is a block of yours.

    Attributes:
        weighing: what `weigh` returned; None before.

    Example:
        >>> from functools import partial
        >>> import renorm
        >>> callback = RenormCallback(partial(renorm.Limits.over, r_max=2.0), weigh=renorm.weigh)
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try to weigh, and set the limits.

        Raises:
            ValueError: there are no limits to set, the length of the training is not known, the model cannot be
                weighed after it, or micro-batches cannot be accumulated.
        """
        if self.accumulate and not pl_module.automatic_optimization:
            raise ValueError(
                "accumulate goes by the steps of Lightning's automatic optimization: in manual optimization wrap the "
                "forwards of a step in `with renorm.accumulate(self):`, and leave accumulate out"
            )
        if self.weigh is not None:
            self._check_weighing(trainer, pl_module)
        steps = 0 if self.limits is None else trainer.estimated_stepping_batches  # which is not known to all trainings
        self.prepare(pl_module, steps, trainer.accumulate_grad_batches)

    def _check_weighing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_one_process(trainer.world_size)
        if not trainer.enable_validation:
            raise ValueError("weigh needs a validation dataloader and a validation_step: give both, or weigh=None")
        has_forward = "forward" in getattr(self.weigh, "keywords", {})
        if self.calls_renorm and not has_forward and type(pl_module).forward is LightningModule.forward:
            raise ValueError(
                f"weigh calls the module's forward, which {type(pl_module).__name__} does not define: define it, "
                "give partial(renorm.weigh, forward=...) a function of module and batch, or weigh=None"
            )
        self.try_weighing(pl_module, _validation_loader(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to merge the micro-batches of a step."""
        self.open_block(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Move the running statistics by the step's micro-batches, before an average of the weights is taken."""
        self.close_block()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget the micro-batches of an unfinished step."""
        self.drop_block()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the example weight.

        Warns:
            UserWarning: that failed.
        """
        self.drop_block()
        if self.weigh is not None:
            self.weigh_at_the_end(pl_module, _validation_loader(trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the settings."""
        checkpoint[_KEY] = recipe(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the settings that were kept."""
        restore(pl_module, checkpoint)


def _validation_loader(trainer: Trainer) -> Any:
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # where no validation has been
    return _first(trainer.val_dataloaders)


def _first(loaders: Any) -> Any:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders
