"""Layers that a tool makes without memory, and fills later: transformers, accelerate, torch itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm

transformers = pytest.importorskip("transformers")


class Config(transformers.PretrainedConfig):
    model_type = "for_these_tests"


class Body(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.linear = nn.Linear(4, 8)
        self.norm = renorm.BatchRenorm1d(8)
        self.post_init()

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.linear(x))


class WithHead(Body):
    norm_class: type[nn.Module] = renorm.BatchRenorm1d

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head_norm = self.norm_class(8)
        self.head = nn.Linear(8, 2)
        self.post_init()


class WithAnyHead(WithHead):
    norm_class = renorm.BatchRenorm


class WithSyncHead(WithHead):
    norm_class = nn.SyncBatchNorm


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved body that a batch has passed."""
    body = Body(Config())
    body.train()(torch.randn(16, 4) + 2)
    body.save_pretrained(tmp_path)
    return tmp_path


def is_fresh(layer: Any) -> bool:
    state = layer.state_dict() | {"num_batches_skipped": getattr(layer, "num_batches_skipped", torch.tensor(0))}
    fresh = renorm.BatchNorm1d(8)
    expected = fresh.state_dict() | {"num_batches_skipped": fresh.num_batches_skipped}
    return all(torch.equal(value, expected[name]) for name, value in state.items())


def dirty_memory() -> None:
    """What is freed now is what is taken next."""
    for size in (8, 1, 8, 2):
        for kind in (torch.float32, torch.int64):
            _ = [torch.full((size,), 77).to(kind) for _ in range(200)]


def test_a_new_layer_of_a_head_is_fresh(saved: Path) -> None:
    dirty_memory()
    model = WithHead.from_pretrained(saved)
    assert is_fresh(model.head_norm)
    assert model.norm.num_batches_tracked == 1
    assert model.norm.num_batches_skipped == 0
    assert model.norm.running_mean.abs().max() > 0
    model.train()(torch.randn(16, 4))


class WithInitializedHead(WithAnyHead):
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, renorm.Norm):
            module.reset_parameters()
        else:
            super()._init_weights(module)


@pytest.mark.parametrize("kind", [WithAnyHead, WithSyncHead], ids=["ours", "torch's"])
def test_layers_without_a_dimension_are_no_more_fresh_than_sync_batch_norm(saved: Path, kind: Any) -> None:
    dirty_memory()
    assert not is_fresh(kind.from_pretrained(saved).head_norm)


def test_a_model_may_say_how_layers_without_a_dimension_begin(saved: Path) -> None:
    dirty_memory()
    model = WithInitializedHead.from_pretrained(saved)
    assert is_fresh(model.head_norm)
    assert model.norm.num_batches_tracked == 1


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 8), renorm.BatchRenorm1d(8))


def trained() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 8), renorm.BatchRenorm1d(8))
    model(torch.randn(16, 4))
    return model


def assert_filled(model: Any) -> None:
    source = trained()
    assert model[1].num_batches_skipped == 0
    assert not model[1].num_batches_skipped.is_meta
    assert model[1].num_batches_tracked == source[1].num_batches_tracked
    model.train()(torch.full((4, 4), torch.nan))
    assert model[1].num_batches_skipped == 1


def test_memory_made_by_to_empty_counts_nothing() -> None:
    dirty_memory()
    model = on_meta().to_empty(device="cpu")
    model.load_state_dict(trained().state_dict())
    assert_filled(model)


def test_a_state_dict_is_assigned_to_a_layer_without_memory() -> None:
    model = on_meta()
    model.load_state_dict(trained().state_dict(), assign=True)
    assert_filled(model)


@pytest.mark.parametrize("include_buffers", [False, True])
def test_accelerate_fills_empty_weights_from_safetensors(tmp_path: Path, include_buffers: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(trained(), str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = nn.Sequential(nn.Linear(4, 8), renorm.BatchRenorm1d(8))
    assert_filled(
        accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    )


def test_safetensors_restores_statistics_and_step(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source, target = trained(), nn.Sequential(nn.Linear(4, 8), renorm.BatchRenorm1d(8))
    safetensors.save_model(source, str(tmp_path / "model.safetensors"))
    assert safetensors.load_model(target, str(tmp_path / "model.safetensors")) == (set(), [])
    torch.testing.assert_close(target.state_dict(), source.state_dict())
