"""The callback in Lightning's trainer, and Lightning's own averaging of weights."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import renorm

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from renorm.integrations.lightning import RenormCallback, RenormModule, _first, restore

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
BATCHES, EPOCHS = 8, 3


class Classifier(LightningModule):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), norm or renorm.BatchRenorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Unsized(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)))


def loader() -> DataLoader[Any]:
    x = torch.randn(8 * BATCHES, 4) + 3
    return DataLoader(TensorDataset(x, (x[:, 0] > 3).long()), 8)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    length = {} if "max_steps" in options else {"max_epochs": EPOCHS}
    return Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, callbacks=list(callbacks), **quiet | length | options
    )


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, BATCHES * EPOCHS), ({"max_steps": 13}, 13), ({"accumulate_grad_batches": 2}, BATCHES * EPOCHS)],
    ids=["epochs", "steps", "micro-batches"],
)
def test_limits_go_by_the_training_s_batches(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    model = Classifier()
    trainer(tmp_path, RenormCallback(), **options).fit(model, loader())
    limits = renorm.Limits.over(steps)
    assert model.net[1].limits == limits
    assert model.net[1].num_batches_tracked == steps
    assert model.net[1].momentum == limits.momentum


def test_a_momentum_goes_with_the_limits_unless_it_was_chosen(tmp_path: Path) -> None:
    model, chosen = Classifier(), Classifier(renorm.BatchRenorm1d(8, momentum=0.02))
    for steps, momentum in ((130, 0.1), (130_000, 0.01)):  # the second fit forgets the first
        of_length = RenormCallback(lambda batches, steps=steps: renorm.Limits.over(steps))
        for either in (model, chosen):
            trainer(tmp_path, of_length, max_steps=1).fit(either, loader())
        assert (model.net[1].momentum, chosen.net[1].momentum) == (momentum, 0.02)


def test_limits_of_one_s_own_and_none(tmp_path: Path) -> None:
    model = Classifier()
    trainer(tmp_path, RenormCallback(partial(renorm.Limits.over, r_max=2.0))).fit(model, loader())
    assert model.net[1].limits == renorm.Limits.over(BATCHES * EPOCHS, r_max=2.0)
    trainer(tmp_path, RenormCallback(limits=None)).fit(model, loader())
    assert model.net[1].limits == renorm.Limits.over(BATCHES * EPOCHS, r_max=2.0)


@pytest.mark.parametrize("options", [{}, {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 99}])
def test_the_example_weight_is_chosen_on_validation_data_and_kept(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = RenormCallback(limits=None, weigh=partial(renorm.weigh, metric="cross_entropy"))
    model = Classifier(nn.BatchNorm1d(8, momentum=0.0))  # running statistics stay wrong, so weighing gains
    validation = loader()
    fitting = trainer(tmp_path, callback, **options)
    fitting.fit(model, loader(), validation)
    assert callback.weighing is not None
    assert callback.weighing.alpha == model.net[1].example_weight > 0

    fitting.save_checkpoint(tmp_path / "weighed.ckpt")
    again = Classifier(renorm.BatchNorm1d(8))
    trainer(tmp_path, RenormCallback()).validate(again, validation, ckpt_path=tmp_path / "weighed.ckpt", verbose=False)
    assert again.net[1].example_weight == callback.weighing.alpha
    x = torch.randn(5, 4)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("loaders", ["first", ["first", "second"], {"one": "first", "other": "second"}])
def test_of_several_validation_loaders_the_first_is_weighed_on(loaders: Any) -> None:
    assert _first(loaders) == "first"


def test_what_cannot_be_done_is_said_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer of the model has limits"):
        trainer(tmp_path, RenormCallback()).fit(Classifier(nn.BatchNorm1d(8)), loader())
    with pytest.raises(ValueError, match=r"which is not known, got (inf|-1)"):
        trainer(tmp_path, RenormCallback(), max_epochs=1).fit(Classifier(), DataLoader(Unsized(), 8))
    model = Classifier()
    with pytest.raises(ValueError, match="weigh needs a validation dataloader"):
        trainer(tmp_path, RenormCallback(weigh=renorm.weigh)).fit(model, loader())
    assert (model.net[1].limits, model.net[1].momentum) == (renorm.Limits(), 0.01)


def test_weigh_without_a_forward_to_call_is_refused_before_the_training(tmp_path: Path) -> None:
    class Steps(Classifier):
        forward = LightningModule.forward

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            self.net(batch[0])

    with pytest.raises(ValueError, match="weigh calls the module's forward, which Steps does not define"):
        trainer(tmp_path, RenormCallback(weigh=renorm.weigh)).fit(model := Steps(), loader(), loader())
    assert model.net[1].limits == renorm.Limits()
    callback = RenormCallback(weigh=partial(renorm.weigh, forward=lambda model, batch: model.net(batch[0])))
    trainer(tmp_path, callback).fit(Steps(), loader(), loader())
    assert callback.weighing is not None


def test_lightning_averages_the_statistics_with_the_weights(tmp_path: Path) -> None:
    """So that this library needs no averaging of its own."""
    model, seen = Classifier(), []

    class Recorder(RenormCallback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            seen.append(copy.deepcopy(pl_module.state_dict()))

    decay = 0.5
    trainer(tmp_path, Recorder(), EMAWeightAveraging(decay=decay)).fit(model, loader())
    average = seen[0]
    for state in seen[1:]:
        for name, value in state.items():
            average[name] = decay * average[name] + (1 - decay) * value
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, average[name])
    assert model.net[1].num_batches_tracked < len(seen)  # averaged like all buffers


def test_an_average_is_what_is_weighed(tmp_path: Path) -> None:
    weighed = []

    def weigh(model: nn.Module, loader: Any) -> Any:
        weighed.append(copy.deepcopy(model.state_dict()))

    model = Classifier()
    callbacks = EMAWeightAveraging(decay=0.9), RenormCallback(weigh=weigh)
    trainer(tmp_path, *callbacks).fit(model, loader(), loader())
    torch.testing.assert_close(weighed, [dict(model.state_dict())], rtol=0, atol=0)


# --- settings in checkpoints --------------------------------------------------------------------------------------


class Plain(Classifier):
    """Built with torch's layer, converted by its user."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(8))


class Keeping(RenormModule, Plain):
    pass


class Restoring(Plain):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore(self, checkpoint)


OPTIONS: dict[str, Any] = {"limits": renorm.Limits.over(77), "examples_per_group": 4, "example_weight": 0.25}


def fitted(folder: Path, kind: type[Classifier], *callbacks: Any) -> tuple[Classifier, Trainer]:
    model = renorm.convert(kind(), renorm.BatchRenorm, **OPTIONS)
    fitting = trainer(folder, *callbacks, max_epochs=1)
    fitting.fit(model, loader())
    return model, fitting


@pytest.mark.parametrize(
    ("kind", "callbacks", "weights_only"),
    [(Keeping, [], False), (Keeping, [], True), (Restoring, [RenormCallback(limits=None)], False)],
    ids=["module", "weights only", "callback and function"],
)
def test_load_from_checkpoint_restores_the_settings(
    tmp_path: Path, kind: type[Classifier], callbacks: list[Any], weights_only: bool
) -> None:
    model, fitting = fitted(tmp_path, kind, *callbacks)
    fitting.save_checkpoint(file := tmp_path / "model.ckpt", weights_only=weights_only)
    again = kind.load_from_checkpoint(file, weights_only=True)
    assert renorm.recipe(again) == renorm.recipe(model)
    x = torch.randn(8, 4)
    for training in (True, False):
        assert torch.equal(again.train(training)(x), model.train(training)(x))


def test_a_trainer_that_resumes_restores_the_settings_before_it_sets_limits(tmp_path: Path) -> None:
    _, fitting = fitted(tmp_path, Plain, RenormCallback(limits=None))
    fitting.save_checkpoint(file := tmp_path / "model.ckpt")
    steps = BATCHES * EPOCHS
    chosen = renorm.Limits.over(steps)
    for callback, limits in (RenormCallback(limits=None), OPTIONS["limits"]), (RenormCallback(), chosen):
        trainer(tmp_path, callback).fit(resumed := Plain(), loader(), ckpt_path=file)
        assert (resumed.net[1].limits, resumed.net[1].example_weight) == (limits, 0.25)
        assert (resumed.net[1].examples_per_group, int(resumed.net[1].num_batches_tracked)) == (4, steps)


def test_a_checkpoint_without_settings_and_a_module_without_layers_are_told(tmp_path: Path) -> None:
    restore(Plain(), {})
    with pytest.warns(UserWarning, match="checkpoint holds no settings of norm layers"):
        restore(Classifier(), {})
    kept = {"renorm": renorm.recipe(nn.ModuleDict({"net": Classifier().net, "head": renorm.BatchNorm1d(3)}))}
    with pytest.warns(UserWarning, match="settings of layers that the module lacks: head; the others are restored"):
        restore(model := Plain(), kept)
    assert type(model.net[1]) is renorm.BatchRenorm1d
    kept = {"renorm": renorm.recipe(Classifier(renorm.GhostBatchNorm1d(8, 2)))}
    with pytest.raises(ValueError, match="to GhostBatchNorm1d, as the recipe says: it is renorm's already"):
        restore(Classifier(), kept)


# --- weighing that fails ------------------------------------------------------------------------------------------


def score_of_a_mean(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target)


def test_weighing_is_tried_before_the_training_and_changes_nothing(tmp_path: Path) -> None:
    model, validation = Classifier(), loader()
    before = copy.deepcopy(model.state_dict())
    failing = partial(renorm.weigh, metric=score_of_a_mean, higher_is_better=False)
    with pytest.raises(
        ValueError, match=r"fail after the training.*score of each example.*give weigh=partial"
    ) as caught:
        trainer(tmp_path, RenormCallback(weigh=failing)).fit(model, loader(), validation)
    assert isinstance(caught.value.__cause__, ValueError)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert (model.net[1].limits, model.training) == (renorm.Limits(), True)


def test_a_trial_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    class Noisy(Classifier):
        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return cross_entropy(self(batch[0] + torch.randn_like(batch[0])), batch[1])

    data, states = loader(), []
    initial = Noisy()
    for weigh in (None, partial(renorm.weigh, metric="cross_entropy")):
        model = copy.deepcopy(initial)
        torch.manual_seed(1)
        trainer(tmp_path, RenormCallback(weigh=weigh)).fit(model, DataLoader(data.dataset, 8, shuffle=True), data)
        states.append(dict(model.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_what_fails_after_the_training_is_a_warning(tmp_path: Path) -> None:
    def weigh(model: nn.Module, loader: Any) -> Any:
        raise RuntimeError("no such score")

    model, callback = Classifier(), RenormCallback(weigh=weigh)
    with pytest.warns(UserWarning, match=r"weigh failed.*RuntimeError\('no such score'\); call renorm.weigh"):
        trainer(tmp_path, callback).fit(model, loader(), loader())
    assert callback.weighing is None
    assert model.net[1].num_batches_tracked == BATCHES * EPOCHS


# --- accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize(("micro_batches", "steps"), [(1, 24), (2, 12), (3, 9)])
def test_micro_batches_of_a_step_move_the_statistics_once(
    tmp_path: Path, micro_batches: int, steps: int, averaged: bool
) -> None:
    model, seen = Classifier(), []

    class Recorder(RenormCallback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            seen.append((trainer.global_step, int(pl_module.net[1].num_batches_tracked)))

    averaging = [EMAWeightAveraging(decay=0.0)] if averaged else []  # the last step's weights and statistics
    fitting = trainer(tmp_path, *averaging, Recorder(accumulate=True), accumulate_grad_batches=micro_batches)
    fitting.fit(model, loader())
    assert model.net[1].limits == renorm.Limits.over(steps)
    assert model.net[1].num_batches_tracked == fitting.global_step == steps
    assert all(step == tracked for step, tracked in seen)
    assert model.net[1].blocks == ()


def test_a_step_is_one_batch_of_its_micro_batches(tmp_path: Path) -> None:
    model = Classifier()
    by_hand, data = copy.deepcopy(model), loader()
    options = {"accumulate_grad_batches": 4, "max_steps": 1}
    trainer(tmp_path, RenormCallback(accumulate=True, limits=None), **options).fit(model, data)
    with renorm.accumulate(by_hand):
        for _, (x, _) in zip(range(4), data, strict=False):
            by_hand(x)
    torch.testing.assert_close(model.net[1].running_var, by_hand.net[1].running_var, rtol=0, atol=0)


def test_a_training_that_fails_in_the_middle_of_a_step_moves_nothing_and_leaves_no_block(tmp_path: Path) -> None:
    class Failing(Classifier):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if index == 3:
                raise RuntimeError("lost")
            return super().training_step(batch, index)

    model = Failing()
    with pytest.raises(RuntimeError, match="lost"):
        trainer(tmp_path, RenormCallback(accumulate=True), accumulate_grad_batches=2).fit(model, loader())
    assert (model.net[1].num_batches_tracked, model.net[1].blocks) == (1, ())


def test_what_cannot_be_accumulated_is_said_before_the_training(tmp_path: Path) -> None:
    callback = RenormCallback(limits=None, accumulate=True)
    with pytest.raises(ValueError, match="accumulate reaches renorm's layers alone, and the model has none"):
        trainer(tmp_path, callback).fit(Plain(), loader())
    model = Classifier()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="in manual optimization wrap the forwards of a step"):
        trainer(tmp_path, callback).fit(model, loader())
