"""What the workers of a distributed training have in common."""

from __future__ import annotations

from typing import Any

from torch import distributed as dist
from torch import nn

from .modules import norms
from .norm import Norm
from .state import Sync
from .workers.group import Workers
from .workers.pool import Pool


def synchronize(
    model: nn.Module, sync: Sync | None, *, process_group: Any | None = None, ranks_per_group: int | None = None
) -> nn.Module:
    """Say for all layers of a model what they have in common with those of other workers, in place.

    None: nothing, each worker has its own statistics (DDP's broadcast_buffers then hands out rank 0's).

    "running": each worker normalizes its own examples; running statistics are merged over workers, equal bit for bit
    on all of them. One collective a step for all layers together, which overlaps with the backward pass; the
    statistics have moved when the backward pass ends. Several forwards before a backward are one update, as in
    `renorm.accumulate`.

    "batch": the statistics are those of all workers' examples together, as with nn.SyncBatchNorm: two collectives per
    layer and step. Workers may have different numbers of examples, or none.

    Workers whose moments are not finite are left out, and counted in `num_batches_skipped`. Without an initialized
    process group, or with one process, layers are as with None. Models compile into one graph, collectives included
    (`torch.compile(model, fullgraph=True)`), as many a step as in eager mode.

    Args:
        model: whose layers are set, not yet wrapped in DDP or FSDP; changed in place.
        sync: None, "running" or "batch".
        process_group: of torch.distributed; None for all processes.
        ranks_per_group: for "batch", so many consecutive ranks share a batch's statistics, a ghost batch of several
            workers; running statistics are merged over all of them as with "running". Must divide the processes.

    Returns:
        The model.

    Raises:
        ValueError: an argument is none of these, or a layer cannot be synchronized so.

    Source:
        Ioffe 2017, section 4: 50 workers with 32 examples each ("running").

    Example:
        >>> import renorm
        >>> model = synchronize(nn.Sequential(renorm.BatchRenorm2d(8)), "running")
        >>> model[0].sync
        'running'
    """
    if ranks_per_group is not None and sync != "batch":
        raise ValueError(f"ranks_per_group is for sync='batch', got sync={sync!r}, ranks_per_group={ranks_per_group}")
    named = norms(model)
    layers = [layer for layer in named.values() if layer.has_statistics or sync != "running"]
    for name, layer in named.items():
        if layer in layers:
            _check(name, layer, sync)
    workers = Workers(process_group)
    merges = sync == "running" or ranks_per_group is not None
    pool = Pool(workers, [layer for layer in layers if layer.has_statistics]) if merges else None
    among = workers if ranks_per_group is None else _groups_of(ranks_per_group, workers)
    for layer in layers:
        layer.synchronize(sync, among, pool if layer.has_statistics else None)
    return model


def joinables(model: nn.Module) -> list[Any]:
    """What a model with `sync="running"` needs in torch's `Join`, where workers have unequal numbers of batches.

    Args:
        model: synchronized by `synchronize` or `convert`.

    Raises:
        ValueError: layers were constructed with `sync="running"`, and belong to no model's collective.

    Returns:
        Joinables, to be listed after the DDP module: `with Join([ddp, *renorm.joinables(model)]):`.

    Example:
        >>> import renorm
        >>> len(joinables(synchronize(nn.Sequential(renorm.BatchRenorm2d(8)), "running")))
        1
    """
    from .workers.joining import JoinablePool

    layers = norms(model).values()
    if any(layer.sync == "running" and layer.pool is None for layer in layers):
        raise ValueError('layers constructed with sync="running" need renorm.synchronize(model, "running") first')
    return [JoinablePool(pool) for pool in dict.fromkeys(layer.pool for layer in layers) if pool is not None]


def _check(name: str, layer: Norm, sync: Sync | None) -> None:
    try:
        layer.check_sync(sync)
    except ValueError as error:
        raise ValueError(f"cannot synchronize {name or 'the root'!r}: {error}") from error


def _groups_of(ranks: int, workers: Workers) -> Workers:
    if workers.number % ranks:
        raise ValueError(f"ranks_per_group must divide the {workers.number} processes, got {ranks}")
    if workers.number == 1:
        return workers
    return Workers(dist.new_subgroups(ranks, group=workers.group)[0])
