"""The callback in Hugging Face's Trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import renorm

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from renorm.integrations.transformers import RenormCallback

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
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, logging_strategy="no", **options,
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
