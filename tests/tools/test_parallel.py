"""FSDP, which keeps batch norm out of mixed precision by type, DDP and accelerate, in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import renorm

from .helpers import converted, images, network, statistics


@pytest.fixture(autouse=True)
def _process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def synchronized() -> nn.Module:
    """The network with layers without a dimension, as those that are made of nn.SyncBatchNorm."""
    return nn.Sequential(*(nn.SyncBatchNorm(8) if isinstance(m, nn.BatchNorm2d) else m for m in network()))


@pytest.mark.filterwarnings("ignore:.*FSDP.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*mixed precision.*:UserWarning")
@pytest.mark.parametrize(
    "make",
    [network, lambda: converted(network()), lambda: converted(synchronized())],
    ids=["torch's", "ours", "without a dimension"],
)
def test_fsdp_leaves_batch_norm_in_full_precision(make: Any) -> None:
    half = torch.bfloat16
    model = FullyShardedDataParallel(
        make(),
        mixed_precision=MixedPrecision(param_dtype=half, reduce_dtype=half, buffer_dtype=half),
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({nn.Conv2d, nn.Linear}),
        use_orig_params=True,
    )
    y = model.train()(images())
    y.sum().backward()
    assert y.dtype == half
    inside = {
        type(module.module).__name__: module.mixed_precision.param_dtype
        for module in model.modules()
        if isinstance(module, FullyShardedDataParallel)
    }
    assert inside.pop("Conv2d") == inside.pop("Linear") == inside.pop("Sequential") == half
    assert list(inside.values()) == [None]  # the batch norms
    assert {value.dtype for value in statistics(model).values()} == {torch.float32}


def test_ddp_trains_the_same() -> None:
    plain, x = network(), images()
    outputs = []
    for model in (plain, converted(plain, renorm.BatchNorm)):
        wrapped = DistributedDataParallel(model.train())
        wrapped(x).sum().backward()
        outputs.append(wrapped(x))
    torch.testing.assert_close(outputs[1], outputs[0])


def test_accelerate_trains_and_restores_the_same(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    plain, x = network(), images()
    ours = converted(plain, renorm.BatchNorm)
    losses = []
    for model in (plain, ours):
        prepared, optimizer = accelerator.prepare(model.train(), torch.optim.SGD(model.parameters(), 0.1))
        for _ in range(3):
            loss = prepared(x).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    expected = copy.deepcopy(accelerator.unwrap_model(prepared).state_dict())
    accelerator.save_state(str(tmp_path / "state"))
    prepared(x + 5)
    accelerator.load_state(str(tmp_path / "state"))
    torch.testing.assert_close(ours.state_dict(), expected)
