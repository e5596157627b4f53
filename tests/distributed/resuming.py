"""A training that torchrun restarts: arguments are the checkpoint, the step at which rank 1 dies, and the mode."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import renorm

STEPS = 8


def connect() -> None:
    """Meet under this attempt's names: torchrun's store still has the addresses of the workers before."""
    environment = os.environ
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(environment["TORCHELASTIC_RESTART_COUNT"], store),
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        timeout=timedelta(seconds=20),
    )


def save(path: Path, state: dict[str, object]) -> None:
    """All or nothing."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def main(path: Path, dies_at: int, sync: str) -> None:
    """Train, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    connect()
    rank, is_first_try = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    torch.manual_seed(0)
    limits = renorm.Limits.over(STEPS)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model = renorm.convert(network, renorm.BatchRenorm, limits=limits, momentum=0.3, sync=sync)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    first = 0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    parallel = DistributedDataParallel(model)
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(100 * step + rank)
        optimizer.zero_grad()
        loss = parallel(torch.randn(5, 6, generator=generator)).square().sum()
        if is_first_try and rank == 1 and step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
        optimizer.step()
        if rank == 0:
            save(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
