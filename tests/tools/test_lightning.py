"""Lightning's callbacks that ask for batch norm, and its synchronization."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import renorm

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging

from .helpers import LIMITS, converted, images, layers, moved, network
from .test_statistics import assert_estimated

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Swapping scheduler"),
]


class Classifier(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        self.last = [parameter.detach().clone() for parameter in self.net.parameters()]
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), 0.01)


class Frozen(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[:6], train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        """Nothing is unfrozen."""


def loader(x: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % 4), 16)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", devices=1, default_root_dir=folder, callbacks=list(callbacks), **quiet | options)


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
def test_a_frozen_batch_norm_does_not_move(tmp_path: Path, ours: bool) -> None:
    net = converted(network()) if ours else network()
    fit = trainer(tmp_path, Frozen(), max_epochs=2).fit
    assert moved(net, lambda: fit(Classifier(net), loader(images(64) + 5))) == 0


class BodyFrozen(Frozen):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[:6], train_bn=True)


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
def test_batch_norm_trains_on_in_a_body_that_is_frozen_without_it(tmp_path: Path, ours: bool) -> None:
    net = converted(network()) if ours else network()
    fit = trainer(tmp_path, BodyFrozen(), max_epochs=2).fit
    assert moved(net, lambda: fit(Classifier(net), loader(images(64) + 5))) > 0
    norm = next(module for module in net if isinstance(module, nn.BatchNorm2d))
    assert norm.weight.requires_grad
    assert not next(module for module in net if isinstance(module, nn.Conv2d)).weight.requires_grad


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_averaged_weights_get_their_own_statistics(tmp_path: Path, limits: renorm.Limits) -> None:
    net = converted(network(), limits=limits)
    x = images(320)
    settings = [(layer.momentum, layer.limits) for layer in layers(net)]
    module = Classifier(net)
    trainer(tmp_path, StochasticWeightAveraging(0.1, 1, annealing_epochs=1), max_epochs=3).fit(module, loader(x))
    assert [(layer.momentum, layer.limits) for layer in layers(net)] == settings
    average = copy.deepcopy(net)  # Lightning ends the pass by one more step, by old gradients
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(module.last), average.parameters())
    assert_estimated(net, renorm.estimate(average, x.split(16)))


@pytest.fixture
def _alone_afterwards() -> Iterator[None]:
    """Without the process group and the variables that Lightning leaves behind."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_alone_afterwards")
def test_sync_batchnorm_names_what_to_call_instead(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, strategy="ddp", sync_batchnorm=True).fit
    with pytest.raises(RuntimeError, match=r'call renorm\.synchronize\(model, "batch"\) instead'):
        fit(Classifier(converted(network())), loader(images(32)))
