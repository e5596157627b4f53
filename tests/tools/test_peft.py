"""PEFT's adapters beside and instead of our layers, as with nn.BatchNorm."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import renorm

from .helpers import converted, images, layers, network, statistics

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type.*Batch:UserWarning")  # of torch's layers too

CONFIGS: dict[str, Any] = {
    "beside": lambda: peft.LoraConfig(target_modules=["0", "3"], r=2),
    "saved": lambda: peft.LoraConfig(target_modules=["0", "3"], modules_to_save=["1", "4"], r=2),
    "tuned": lambda: peft.LNTuningConfig(target_modules=["1", "4"]),
}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_train_the_same_and_statistics_move_the_same(config: Any, fuse: bool) -> None:
    plain, x = network(), images()
    outputs, trained, moved = [], [], []
    for model in (plain, converted(plain, renorm.BatchNorm, fuse=fuse)):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(copy.deepcopy(model), config()).train()
        adapted(x).sum().backward()
        outputs.append(adapted(x))
        trained.append([name for name, parameter in adapted.named_parameters() if parameter.grad is not None])
        moved.append(statistics(adapted))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert trained[0] == trained[1]
    torch.testing.assert_close(moved[1], moved[0])


@pytest.mark.parametrize("config", ["saved", "tuned"])
def test_an_adapter_that_holds_the_layers_saves_their_statistics(tmp_path: Path, config: str) -> None:
    model = converted(network())
    adapted = peft.get_peft_model(copy.deepcopy(model), CONFIGS[config]()).train()
    adapted(images() + 5)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    x = images()
    torch.testing.assert_close(loaded(x), adapted.eval()(x))
    merged = loaded.merge_and_unload()
    assert [type(layer) for layer in layers(merged)] == [renorm.BatchRenorm2d, renorm.BatchRenorm2d]
    torch.testing.assert_close(merged(x), adapted(x))


def test_an_adapter_beside_the_layers_leaves_their_statistics_out_as_of_torch_s() -> None:
    for model in (network(), converted(network())):
        adapted = peft.get_peft_model(model, CONFIGS["beside"]())
        assert not [name for name in peft.get_peft_model_state_dict(adapted) if "running" in name]


def test_the_layer_itself_is_no_target_for_low_rank_matrices() -> None:
    for model in (network(), converted(network())):
        with pytest.raises(ValueError, match=rf"Target module {type(model[1]).__name__}.* is not supported"):
            peft.get_peft_model(model, peft.LoraConfig(target_modules=["1"]))
    assert isinstance(model[1], nn.BatchNorm2d)
