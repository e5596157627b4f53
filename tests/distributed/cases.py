"""What the processes do; the tests compare what they return."""

from __future__ import annotations

import copy
import math
import pickle
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import renorm

warnings.filterwarnings("ignore", ".*should not be instantiated.*")
warnings.filterwarnings("ignore", ".*find_unused_parameters=True was specified.*")

Batch = dict[str, Tensor]


def layer(options: dict[str, Any]) -> renorm.Norm:
    """A layer whose running statistics are not those of a fresh one."""
    made = renorm.Norm(4, **{"momentum": 0.3, **options})
    with torch.no_grad():
        if made.track_running_stats:
            made.running_mean.copy_(torch.linspace(-1, 1, 4))
            made.running_var.copy_(torch.linspace(0.5, 2, 4))
        for parameter in made.parameters():
            parameter.copy_(torch.linspace(0.5, 1.5, 4))
    return made


def batch(size: int = 12) -> Batch:
    """A batch for all workers together."""
    generator = torch.Generator().manual_seed(5)
    shape = (size, 4, 3, 2)
    return {
        "x": torch.randn(shape, generator=generator) * 2 + torch.arange(4.0)[:, None, None],
        "residual": torch.randn(shape, generator=generator),
        "target": torch.randn(shape, generator=generator),
        "mask": torch.rand((size, 3, 2), generator=generator) > 0.2,
    }


def shares(sizes: list[int]) -> slice:
    """This worker's examples."""
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def buffers(module: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


def step(model: renorm.Norm, part: Batch, masked: bool) -> dict[str, Any]:
    """Output, gradients and buffers of a forward and backward."""
    x, residual = part["x"].clone().requires_grad_(), part["residual"].clone().requires_grad_()
    y = model(x, part["mask"] if masked else None, residual=residual)
    (y * part["target"]).sum().backward()
    parameters = [parameter.grad for parameter in model.parameters()]
    return {"y": y.detach(), "dx": x.grad, "dresidual": residual.grad, "parameters": parameters}


def steps(options: dict[str, Any], sizes: list[int], masked: bool) -> dict[str, Any]:
    """Two steps of a layer that is synchronized, on this worker's share."""
    model, whole = layer(options), batch(sum(sizes))
    results = []
    for scale in (1.0, 2.0):
        model.zero_grad()
        part = {name: tensor[shares(sizes)] for name, tensor in whole.items()}
        results.append(step(model, part | {"x": part["x"] * scale}, masked))
    return {"steps": results, "buffers": buffers(model)}


def in_precision(dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, list[Tensor]]:
    """A forward and backward in another dtype and memory format."""
    model = layer({"limits": renorm.Limits.constant(), "tracking": "std", "sync": "batch"})
    x = batch()["x"][shares([5, 7])].to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x.requires_grad_()
    y = model(x)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    return y.detach(), buffers(model)


def grouped(ranks_per_group: int) -> dict[str, Any]:
    """A step with ghost groups of ranks."""
    model = layer({"limits": renorm.Limits.constant(), "tracking": "std"})
    renorm.synchronize(model, "batch", ranks_per_group=ranks_per_group)
    sizes = [3] * dist.get_world_size()
    part = {name: tensor[shares(sizes)] for name, tensor in batch(sum(sizes)).items()}
    return {"steps": [step(model, part, masked=False)], "buffers": buffers(model)}


def in_process_groups() -> list[Tensor]:
    """Running statistics of two trainings side by side, each in half of the processes."""
    half = dist.get_world_size() // 2
    groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, 2 * half)))]
    model = nn.Sequential(layer({}))
    renorm.synchronize(model, "running", process_group=groups[dist.get_rank() // half])
    model(batch()["x"] + dist.get_rank()).sum().backward()
    return buffers(model)


class Network(nn.Module):
    """Convolutions with a norm each, one of which only some workers use."""

    def __init__(self, norm: type[renorm.Norm] = renorm.BatchRenorm, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        options = {"momentum": 0.3, **options}
        self.first = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), norm(8, **options), nn.ReLU())
        self.detour = nn.Sequential(nn.Conv2d(8, 8, 1), norm(8, **options), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), norm(4, **options), nn.ReLU(inplace=True))

    def forward(self, x: Tensor, detour: bool = True) -> Tensor:
        x = self.first(x)
        if detour:
            x = self.detour(x)
        return self.last(x).mean((1, 2, 3))


LIMITS = renorm.Limits(r_max=3.0, d_max=5.0, start=1, r_end=6, d_end=4)


def trained(
    sync: str | None,
    num_steps: int = 4,
    *,
    detours: bool = False,
    broken: tuple[int, int] | None = None,
    checkpointed: bool | None = None,
    accumulated: int = 1,
    **ddp: Any,
) -> dict[str, Any]:
    """A few steps under DDP; returns parameters and buffers, and how many collectives the layers asked for.

    Args:
        sync: of the layers.
        num_steps: optimizer steps.
        detours: whether odd ranks leave out a part of the network.
        broken: rank and step at which inputs are not finite.
        checkpointed: use_reentrant of a checkpoint around the first part; None for no checkpoint.
        accumulated: forwards and backwards for each optimizer step.
        **ddp: of DistributedDataParallel.
    """
    rank = dist.get_rank()
    network = renorm.synchronize(Network(limits=LIMITS), sync)
    if checkpointed is not None:
        first = network.first.forward
        network.first.forward = lambda x: torch.utils.checkpoint.checkpoint(first, x, use_reentrant=checkpointed)
    model = DistributedDataParallel(network, **ddp)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(rank)
    count = CollectiveCount()
    for number in range(num_steps):
        optimizer.zero_grad()
        with count, renorm.accumulate(*[network] * (accumulated > 1)):
            for _ in range(accumulated):
                x = torch.randn(6, 4, 5, 5, generator=generator, requires_grad=True)
                if broken == (rank, number):
                    x = x * math.nan
                loss = model(x, not (detours and rank % 2)).sum()
                loss.backward()
        if broken is None:
            optimizer.step()
    return {
        "parameters": [parameter.detach() for parameter in network.parameters()],
        "buffers": buffers(network),
        "collectives": count.collectives / num_steps,
    }


class CollectiveCount:
    """Counts the collectives of layers: those on process groups that are not DDP's."""

    def __init__(self) -> None:
        self.collectives = 0

    def __enter__(self) -> None:
        self._all_reduce, self._all_gather = dist.all_reduce, dist.all_gather
        dist.all_reduce, dist.all_gather = self._counted(dist.all_reduce), self._counted(dist.all_gather)

    def __exit__(self, *error: object) -> None:
        dist.all_reduce, dist.all_gather = self._all_reduce, self._all_gather

    def _counted(self, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.collectives += 1
            return function(*arguments, **options)

        return call


def simulated(number: int) -> dict[str, Any]:
    """What `trained("running")` does, in one process: a microbatch for each worker, one gradient and one update."""
    network = Network(limits=LIMITS)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    generators = [torch.Generator().manual_seed(rank) for rank in range(number)]
    for _ in range(4):
        optimizer.zero_grad()
        with renorm.accumulate(network):
            for generator in generators:
                (network(torch.randn(6, 4, 5, 5, generator=generator)).sum() / number).backward()
        optimizer.step()
    return {"parameters": [p.detach() for p in network.parameters()], "buffers": buffers(network)}


def uneven() -> dict[str, Any]:
    """Workers with 2, 3, ... batches, joined."""
    network = renorm.synchronize(Network(limits=LIMITS), "running")
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Join([model, *renorm.joinables(network)]):
        for number in range(2 + dist.get_rank()):
            optimizer.zero_grad()
            model(torch.randn(6, 4, 5, 5) + number).sum().backward()
            optimizer.step()
    return {"parameters": [p.detach() for p in network.parameters()], "buffers": buffers(network)}


def without_gradients() -> list[Tensor]:
    """Training forwards under no_grad, as for re-estimating statistics."""
    network = renorm.synchronize(Network(limits=LIMITS), "running")
    generator = torch.Generator().manual_seed(dist.get_rank())
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(6, 4, 5, 5, generator=generator))
    return buffers(network)


def evaluated_on_one_rank() -> float:
    """Evaluation by rank 0 alone, between steps: nobody waits for the others."""
    network = renorm.synchronize(Network(limits=LIMITS), "running")
    network(torch.randn(6, 4, 5, 5)).sum().backward()
    if dist.get_rank() == 0:
        network.eval()(torch.randn(2, 4, 5, 5)).sum().backward()
        copy.deepcopy(network)(torch.randn(1, 4, 5, 5))
        network.train()
    network(torch.randn(6, 4, 5, 5)).sum().backward()
    return float(network.last[1].num_batches_tracked)


def copied() -> list[list[Tensor]]:
    """A copy of a synchronized model trains by itself, with collectives of its own."""
    network = renorm.synchronize(Network(limits=LIMITS), "running")
    twin = copy.deepcopy(network)
    x = torch.randn(6, 4, 5, 5) + dist.get_rank()
    for model in (network, twin):
        model(x).sum().backward()
    return [buffers(network), buffers(twin)]


def layers_by_hand() -> list[Tensor]:
    """Layers that were only constructed with sync="running", without `synchronize`."""
    network = Network(limits=LIMITS, sync="running")
    for _ in range(2):
        network(torch.randn(6, 4, 5, 5) + dist.get_rank()).sum().backward()
    return buffers(network)


def compiled(sync: str) -> list[list[Tensor]]:
    """Parameters' gradients and buffers, compiled and eager."""
    found = []
    for compile_ in (lambda model: torch.compile(model, backend="aot_eager"), lambda model: model):
        network = renorm.synchronize(Network(limits=LIMITS), sync)
        generator = torch.Generator().manual_seed(dist.get_rank())
        model = compile_(network)
        for _ in range(2):
            model(torch.randn(6, 4, 5, 5, generator=generator)).sum().backward()
        found.append([*(parameter.grad for parameter in network.parameters()), *buffers(network)])
    return found


def sharded(sync: str | None, checkpointed: bool = False) -> dict[str, Any]:
    """FSDP2 with mixed precision: parameters in bfloat16, statistics in float32."""
    network = renorm.synchronize(Network(limits=LIMITS), sync)
    parts: list[nn.Module] = [network.first, network.detour, network.last]
    if checkpointed:
        for part in parts:
            composable_checkpoint(part)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    outputs = []
    for _ in range(3):
        optimizer.zero_grad()
        y = network(torch.randn(6, 4, 5, 5, generator=generator))
        y.sum().backward()
        optimizer.step()
        outputs.append(y.dtype)
    parameters = [parameter.full_tensor().detach() for parameter in network.parameters()]
    return {"parameters": parameters, "buffers": buffers(network), "outputs": outputs}


def estimated() -> list[Tensor]:
    """Statistics re-estimated from this worker's share of the data."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), layer({"sync": "running"}))
    torch.manual_seed(0)
    renorm.estimate(model, batch(12)["x"][shares([5, 7])].split(3))
    return buffers(model[0])


def in_another_order() -> list[Tensor]:
    """Layers by hand that the ranks call in different orders."""
    layers = [renorm.BatchNorm1d(2, sync="running", momentum=1.0) for _ in range(2)]
    x = torch.randn(50, 2)
    order = [0, 1] if dist.get_rank() == 0 else [1, 0]
    sum(layers[i](x + 100 * i).sum() for i in order).backward()
    return [layer.running_mean for layer in layers]


def frozen_backbone() -> list[Tensor]:
    """Layers without a gradient, in training mode: five steps, and a forward that shows where they have come to."""
    backbone = nn.Sequential(nn.Linear(4, 4), renorm.BatchRenorm1d(4, limits=LIMITS)).requires_grad_(False)
    model = renorm.synchronize(nn.Sequential(backbone, nn.Linear(4, 1)), "running")
    for _ in range(6):
        model(torch.randn(8, 4) + dist.get_rank()).sum().backward()
    return buffers(model)


def constant_channel() -> list[Tensor]:
    """A channel that is constant and large: there is no variance to lose."""
    model = renorm.BatchNorm1d(1, momentum=1.0)
    renorm.synchronize(model, "running")
    outputs = []
    for value in (1_936_552.125, 123_456.789, 3e6):
        x = torch.full((5 + 2 * dist.get_rank(), 1), value)
        model(x).sum().backward()
        outputs += [model.running_var.clone(), model.eval()(x).detach()]
        model.train()
    return outputs


def left_out(how: str) -> list[int]:
    """How many batches every layer says were left out, where the last rank's input is not finite."""
    model = nn.Sequential(nn.Linear(4, 4), layer({"limits": LIMITS}), nn.Linear(4, 4))
    renorm.synchronize(model, "batch", ranks_per_group=2 if how == "groups" else None)
    x = torch.randn(5, 4, requires_grad=True)
    if dist.get_rank() == dist.get_world_size() - 1:
        x = x * math.nan
    if how == "failed block":
        try:
            with renorm.accumulate(model):
                model(x)
                raise ArithmeticError
        except ArithmeticError:
            return [int(model[1].num_batches_skipped)]
    call = torch.utils.checkpoint.checkpoint if how == "checkpoint" else lambda model, x, **options: model(x)
    call(model, x, use_reentrant=True).sum().backward()
    return [int(model[1].num_batches_skipped)]


def loaded_without_its_group() -> str:
    """A layer that was synchronized within groups, pickled and loaded."""
    model = renorm.synchronize(nn.Sequential(layer({})), "batch", ranks_per_group=2)
    try:
        pickle.loads(pickle.dumps(model))(batch()["x"])
    except RuntimeError as error:
        return str(error)
    return "no error"


def with_integer_eps() -> list[Tensor]:
    """Layers whose eps is the integer 0."""
    model = renorm.synchronize(nn.Sequential(renorm.BatchNorm1d(3, eps=0), renorm.BatchRenorm1d(3)), "running")
    model(torch.randn(8, 3) + dist.get_rank()).sum().backward()
    return buffers(model)


def missing(sync: str) -> tuple[str, float]:
    """A worker that does not come to the collective: the error of the others, and after how many seconds."""
    network = renorm.synchronize(Network(limits=LIMITS), sync)
    start = time.monotonic()
    if dist.get_rank() > 0:
        time.sleep(8)
        return "", 0.0
    try:
        network(torch.randn(6, 4, 5, 5)).sum().backward()
    except Exception as error:
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start
