"""What the processes do; the tests compare what they return."""

from __future__ import annotations

import copy
import math
import pickle
import time
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.profiler import profile
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
    compiles: bool = False,
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
        compiles: whether the model is compiled.
        **ddp: of DistributedDataParallel.
    """
    rank = dist.get_rank()
    network = renorm.synchronize(Network(limits=LIMITS), sync)
    if checkpointed is not None:
        first = network.first.forward
        network.first.forward = lambda x: torch.utils.checkpoint.checkpoint(first, x, use_reentrant=checkpointed)
    model = DistributedDataParallel(network, **ddp)
    if compiles:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager")
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


def uneven(compiles: bool = False) -> dict[str, Any]:
    """Workers with 2, 3, ... batches, joined."""
    network = renorm.synchronize(Network(limits=LIMITS), "running")
    model = DistributedDataParallel(network)
    call = torch.compile(model, backend="aot_eager") if compiles else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Join([model, *renorm.joinables(network)]):
        for number in range(2 + dist.get_rank()):
            optimizer.zero_grad()
            call(torch.randn(6, 4, 5, 5) + number).sum().backward()
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


def evaluated_alone_without_statistics() -> list[float]:
    """Evaluation by rank 0 alone, of a layer that normalizes by the batch then too."""
    layer = renorm.BatchNorm2d(4, track_running_stats=False, sync="batch")
    if dist.get_rank() > 0:
        return []
    y = layer.eval()(torch.randn(6, 4, 5, 5))
    return [float(y.mean()), float(y.var())]


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


class Checkpointed(nn.Sequential):
    """Layers that are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.utils.checkpoint.checkpoint(self[0], x, use_reentrant=False)
        return y


def compiled(way: str, sync: str, backend: str = "aot_eager", **options: Any) -> list[dict[str, Any]]:
    """Three steps of a network compiled into one graph, and in eager mode.

    Args:
        way: how a step goes.
        sync: of the layers.
        backend: of the compiler.
        **options: of `synchronize`.
    """
    # r and d are computed again from statistics that the forward has moved, with "batch"
    limits = None if (way, sync) == ("checkpoint", "batch") else LIMITS
    network = Network(limits=limits, act="silu" if way == "activation" else None)
    if way == "checkpoint":
        network.first = Checkpointed(network.first)
    models = [renorm.synchronize(copy.deepcopy(network), sync, **options) for _ in range(2)]
    torch._dynamo.reset()
    calls = [torch.compile(models[0], fullgraph=True, backend=backend), models[1]]
    return [three_steps(way, *pair) for pair in zip(models, calls, strict=True)]


def three_steps(way: str, network: Network, call: Any) -> dict[str, Any]:
    """What comes out of a network, and how many collectives it takes a step."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    with profile() as profiler:
        outputs = [WAYS[way](network, call, generator) for _ in range(3)]
    return {
        "outputs": outputs,
        "gradients": [parameter.grad for parameter in network.parameters()],
        "buffers": buffers(network),
        "collectives": collectives(profiler) / 3,
    }


def compiled_apart(sync: str) -> list[list[dict[str, Any]]]:
    """Models of one kind, synchronized among all workers and among half of them; each compiled and in eager mode."""
    half = dist.get_world_size() // 2
    groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, 2 * half)))]
    torch._dynamo.reset()
    found = []
    for group in (None, groups[dist.get_rank() // half]):
        models = [renorm.synchronize(Network(limits=LIMITS), sync, process_group=group) for _ in range(2)]
        calls = [torch.compile(models[0], fullgraph=True, backend="aot_eager"), models[1]]
        found.append([three_steps("plain", *pair) for pair in zip(models, calls, strict=True)])
    return found


def compiled_twins(sync: str) -> tuple[list[list[Tensor]], int]:
    """Compiled models of one kind, the second with a step more, batches of any size; and how many graphs there are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    models = [renorm.synchronize(Network(limits=LIMITS), sync) for _ in range(2)]
    for model, sizes in zip(models, ((6, 4), (3, 8, 5)), strict=True):
        call = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for size in sizes:
            call(torch.randn(size + dist.get_rank(), 4, 5, 5)).sum().backward()
    return [buffers(model) for model in models], torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled_layer(sync: str, masked: bool) -> list[dict[str, Any]]:
    """A layer and what follows in one graph: the gradient that arrives is expanded, and goes on to a residual."""
    torch._dynamo.reset()
    part = {name: tensor[shares([5, 7])] for name, tensor in batch().items()}
    found = []
    for compile_ in (partial(torch.compile, fullgraph=True, backend="aot_eager"), lambda function: function):
        model = renorm.synchronize(nn.Sequential(layer({"limits": renorm.Limits.constant(), "act": "silu"})), sync)[0]
        mask = part["mask"] if masked else None
        call = compile_(lambda x, residual, model=model, mask=mask: model(x, mask, residual=residual).sum())
        x, residual = part["x"].clone().requires_grad_(), part["residual"].clone().requires_grad_()
        with profile() as profiler:
            loss = call(x, residual)
            loss.backward()
        gradients = [x.grad, residual.grad, *(parameter.grad for parameter in model.parameters())]
        found.append(
            {
                "outputs": [loss.detach()],
                "gradients": gradients,
                "buffers": buffers(model),
                "collectives": collectives(profiler),
            }
        )
    return found


def collectives(profiler: profile) -> int:
    """How many there were, of whomever."""
    return sum(event.name.startswith("gloo:") for event in profiler.function_events)


def _plain(network: Network, model: Any, generator: torch.Generator) -> Tensor:
    y: Tensor = model(torch.randn(6, 4, 5, 5, generator=generator))
    y.sum().backward()
    return y.detach()


def _uneven(network: Network, model: Any, generator: torch.Generator) -> Tensor:
    y: Tensor = model(torch.randn(6 - 2 * dist.get_rank(), 4, 5, 5, generator=generator))
    y.sum().backward()
    return y.detach()


def _not_finite(network: Network, model: Any, generator: torch.Generator) -> Tensor:
    x = torch.randn(6, 4, 5, 5, generator=generator)
    y: Tensor = model(x * torch.nan if dist.get_rank() == 1 and network.last[1].num_batches_tracked == 1 else x)
    y.sum().backward()
    return y.detach()


def _two_forwards(network: Network, model: Any, generator: torch.Generator) -> Tensor:
    y: Tensor = sum(model(torch.randn(6, 4, 5, 5, generator=generator)) for _ in range(2))
    y.sum().backward()
    return y.detach()


def _recomputed(network: Network, model: Any, generator: torch.Generator) -> Tensor:
    x = torch.randn(6, 4, 5, 5, generator=generator, requires_grad=True)
    y: Tensor = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    y.sum().backward()
    return y.detach()


def _accumulated(network: Network, model: Any, generator: torch.Generator) -> Tensor:
    with renorm.accumulate(network):
        return sum(_plain(network, model, generator) for _ in range(2))


def _frozen(network: Network, model: Any, generator: torch.Generator) -> Tensor:
    with renorm.freeze(network):
        return _plain(network, model, generator)


def _without_gradients(network: Network, model: Any, generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(torch.randn(6, 4, 5, 5, generator=generator))
    return y


def _frozen_backbone(network: Network, model: Any, generator: torch.Generator) -> Tensor:
    network.first.requires_grad_(False)
    return _plain(network, model, generator)


WAYS = {
    "plain": _plain,
    "uneven": _uneven,
    "not finite": _not_finite,
    "two forwards": _two_forwards,
    "recomputed": _recomputed,
    "accumulated": _accumulated,
    "frozen": _frozen,
    "without gradients": _without_gradients,
    "frozen backbone": _frozen_backbone,
    "activation": _plain,
    "checkpoint": _plain,
}


def sharded(sync: str | None, checkpointed: bool = False, compiles: bool = False) -> dict[str, Any]:
    """FSDP2 with mixed precision: parameters in bfloat16, statistics in float32."""
    network = renorm.synchronize(Network(limits=LIMITS), sync)
    parts: list[nn.Module] = [network.first, network.detour, network.last]
    if checkpointed:
        for part in parts:
            composable_checkpoint(part)
    if compiles:
        torch._dynamo.reset()
        for part in parts:
            part.compile(fullgraph=True, backend="aot_eager")
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
