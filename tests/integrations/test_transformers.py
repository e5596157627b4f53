"""The callback in Hugging Face's Trainer."""

from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import renorm

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from renorm.integrations.transformers import RenormCallback, restore, store

EXAMPLES, BATCH_SIZE, EPOCHS = 32, 4, 2


def resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_channels=1, num_labels=2
    )
    return ResNetForImageClassification(config)


def data() -> list[dict[str, Any]]:
    return [{"pixel_values": torch.randn(1, 8, 8) + i % 2, "labels": i % 2} for i in range(EXAMPLES)]


def trainer(model: nn.Module, folder: Path, callback: RenormCallback, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH_SIZE, num_train_epochs=EPOCHS, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no", **{"save_strategy": "no"} | options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data(), eval_dataset=data(), callbacks=[callback])


def layers(model: nn.Module) -> list[renorm.Norm]:
    return [module for module in model.modules() if isinstance(module, renorm.Norm)]


@pytest.mark.parametrize(
    ("options", "batches"),
    [({}, 16), ({"max_steps": 3}, 3), ({"gradient_accumulation_steps": 2}, 16)],
    ids=["epochs", "steps", "micro-batches"],
)
def test_limits_go_by_the_training_s_batches(tmp_path: Path, options: dict[str, Any], batches: int) -> None:
    model = renorm.convert(resnet(), renorm.BatchRenorm)
    trainer(model, tmp_path, RenormCallback(), **options).train()
    assert {layer.limits for layer in layers(model)} == {renorm.Limits.over(batches)}
    assert {int(layer.num_batches_tracked) for layer in layers(model)} == {batches}


def test_the_example_weight_is_chosen_on_evaluation_data(tmp_path: Path) -> None:
    model = renorm.convert(resnet(), renorm.BatchNorm, momentum=0.0)  # running statistics stay wrong
    callback = RenormCallback(limits=None, weigh=partial(renorm.weigh, metric="cross_entropy"))
    trainer(model, tmp_path, callback, eval_strategy="epoch").train()
    assert callback.weighing is not None
    assert {layer.example_weight for layer in layers(model)} == {callback.weighing.alpha}
    assert callback.weighing.gain.low > 0


def test_a_training_without_an_evaluation_ends_with_a_warning(tmp_path: Path) -> None:
    callback = RenormCallback(limits=None, weigh=renorm.weigh)
    short = trainer(renorm.convert(resnet(), renorm.BatchNorm), tmp_path, callback, eval_strategy="epoch",
                    eval_delay=99, max_steps=2)  # fmt: skip
    with pytest.warns(UserWarning, match=r"none ran in this training.*call renorm.weigh\(model, loader\)"):
        short.train()
    assert callback.weighing is None


def test_what_cannot_be_done_is_said_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer of the model has limits"):
        trainer(resnet(), tmp_path, RenormCallback()).train()
    model = renorm.convert(resnet(), renorm.BatchRenorm)
    with pytest.raises(ValueError, match="set eval_strategy"):
        trainer(model, tmp_path, RenormCallback(weigh=renorm.weigh)).train()
    assert {layer.limits for layer in layers(model)} == {renorm.Limits()}


# --- settings beside the model's files ----------------------------------------------------------------------------


def test_checkpoints_and_the_output_folder_hold_the_settings(tmp_path: Path) -> None:
    model = renorm.convert(resnet(), renorm.BatchRenorm, examples_per_group=2)
    callback = RenormCallback(weigh=lambda model, loader: setattr(layers(model)[0], "example_weight", 0.5))
    training = trainer(model, tmp_path, callback, save_strategy="epoch", eval_strategy="epoch")
    training.train()
    training.save_model()
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert [folder.name for folder in checkpoints] == ["checkpoint-16", "checkpoint-8"]
    for folder, weight in ((checkpoints[0], 0.0), (tmp_path, 0.5)):
        again = restore(ResNetForImageClassification.from_pretrained(folder), folder)
        assert layers(again)[0].example_weight == weight
        layers(again)[0].example_weight = 0.5
        assert renorm.recipe(again) == renorm.recipe(model)
        x = torch.randn(4, 1, 8, 8)
        assert torch.equal(again.eval()(x).logits, model.eval()(x).logits)


def test_a_model_is_stored_by_hand(tmp_path: Path) -> None:
    model = renorm.convert(resnet(), renorm.BatchRenorm, example_weight=0.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"renorm\.json"):
        restore(ResNetForImageClassification.from_pretrained(tmp_path), tmp_path)
    store(model, tmp_path)
    again = restore(ResNetForImageClassification.from_pretrained(tmp_path), tmp_path)
    assert renorm.recipe(again) == renorm.recipe(model)


def test_a_model_without_our_layers_leaves_no_file(tmp_path: Path) -> None:
    trainer(resnet(), tmp_path, RenormCallback(limits=None), max_steps=1).train()
    assert not (tmp_path / "renorm.json").exists()


# --- weighing that fails ------------------------------------------------------------------------------------------


class Segmentation(nn.Module):
    """Logits of a coarser grid than the labels, as SegFormer's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), renorm.BatchRenorm2d(4), nn.Conv2d(4, 2, 1))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.net(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels[:, ::2, ::2]), "logits": logits}


def masks() -> list[dict[str, Any]]:
    return [{"pixel_values": torch.randn(1, 8, 8), "labels": torch.randint(2, (8, 8))} for _ in range(8)]


def coarse(output: Any, target: torch.Tensor) -> torch.Tensor:
    return (output["logits"].argmax(1) == target[:, ::2, ::2]).double().mean((1, 2))


@pytest.mark.parametrize("evaluated", [False, True])
def test_weighing_is_tried_before_the_training(tmp_path: Path, evaluated: bool) -> None:
    model = Segmentation()
    before = copy.deepcopy(model.state_dict())
    training = trainer(model, tmp_path, RenormCallback(weigh=renorm.weigh), eval_strategy="epoch")
    training.train_dataset, training.eval_dataset = masks(), masks()
    if evaluated:
        training.evaluate()
    with pytest.raises(ValueError, match=r"fail after the training.*give weigh=partial\(renorm.weigh, metric="):
        training.train()
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert model.net[1].limits == renorm.Limits()


def test_a_metric_that_suits_the_outputs_is_taken(tmp_path: Path) -> None:
    callback = RenormCallback(weigh=partial(renorm.weigh, metric=coarse, higher_is_better=True))
    training = trainer(Segmentation(), tmp_path, callback, eval_strategy="epoch")
    training.train_dataset, training.eval_dataset = masks(), masks()
    training.train()
    assert callback.weighing is not None


class Augmented(list[dict[str, Any]]):
    def __getitem__(self, index: Any) -> Any:
        example = super().__getitem__(index)
        return example | {"pixel_values": example["pixel_values"] + torch.randn(1, 8, 8) + random.random()}


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(data())


def test_a_trial_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    initial, images, states = renorm.convert(resnet(), renorm.BatchRenorm), data(), []
    for weigh in (None, partial(renorm.weigh, metric="cross_entropy")):
        model = copy.deepcopy(initial)
        callback = RenormCallback(limits=None, weigh=weigh)
        training = trainer(model, tmp_path, callback, eval_strategy="epoch", max_steps=5)
        training.train_dataset, training.eval_dataset = Augmented(images), images
        random.seed(0)
        training.train()
        states.append(dict(model.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_data_that_cannot_be_indexed_are_not_tried(tmp_path: Path) -> None:
    callback = RenormCallback(weigh=partial(renorm.weigh, metric="cross_entropy"))
    model = renorm.convert(resnet(), renorm.BatchRenorm)
    training = trainer(model, tmp_path, callback, eval_strategy="steps", eval_steps=2, max_steps=2)
    training.train_dataset = Streamed()
    training.train()
    assert callback.weighing is not None


def test_what_fails_after_the_training_is_a_warning_and_the_model_is_saved(tmp_path: Path) -> None:
    def weigh(model: nn.Module, loader: Any) -> Any:
        raise RuntimeError("no such score")

    model = renorm.convert(resnet(), renorm.BatchRenorm)
    training = trainer(model, tmp_path, RenormCallback(weigh=weigh), eval_strategy="epoch")
    with pytest.warns(UserWarning, match=r"weigh failed.*RuntimeError\('no such score'\); call renorm.weigh"):
        training.train()
    training.save_model()
    again = restore(ResNetForImageClassification.from_pretrained(tmp_path), tmp_path)
    assert renorm.recipe(again) == renorm.recipe(model)


# --- accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro_batches", "steps"), [(1, 16), (2, 8), (3, 6)])
def test_micro_batches_of_a_step_move_the_statistics_once(tmp_path: Path, micro_batches: int, steps: int) -> None:
    model = renorm.convert(resnet(), renorm.BatchRenorm)
    callback = RenormCallback(accumulate=True)
    training = trainer(model, tmp_path, callback, gradient_accumulation_steps=micro_batches)
    training.train()
    assert training.state.global_step == steps
    assert {layer.limits for layer in layers(model)} == {renorm.Limits.over(steps)}
    assert {int(layer.num_batches_tracked) for layer in layers(model)} == {steps}
    assert {layer.blocks for layer in layers(model)} == {()}


def test_an_interrupted_step_is_forgotten(tmp_path: Path) -> None:
    class Failing(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            super().training_step(*args, **kwargs)
            raise KeyboardInterrupt

    model = renorm.convert(resnet(), renorm.BatchRenorm)
    callback = RenormCallback(accumulate=True)
    arguments = trainer(model, tmp_path, callback, gradient_accumulation_steps=2).args
    with pytest.raises(KeyboardInterrupt):
        Failing(model, arguments, train_dataset=data(), callbacks=[callback]).train()
    callback.drop_block()
    assert {layer.blocks for layer in layers(model)} == {()}
    assert {int(layer.num_batches_tracked) for layer in layers(model)} == {0}
