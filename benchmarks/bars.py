"""What was promised of speed and memory, and whether the result files keep it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import contenders as c
from csvfiles import Row
from ratios import Ratio, between_threads, mean, ratios, select, worst
from shapes import LAYOUTS

_LARGE_MB, _SPEED_UP_MB, _COPY_BOUND_MB = 1, 8, 100
_BARRED_THREADS = (1, 2)


@dataclass(frozen=True)
class Bar:
    """A promise.

    Args:
        subject: what is measured.
        limit: the most it may be; None where it is only reported.
        measured: the value, None if nothing was measured.
        remark: how the value came about.
    """

    subject: str
    limit: float | None
    measured: float | None
    remark: str = ""

    @property
    def verdict(self) -> str:
        """Whether it is kept."""
        if self.measured is None:
            return "not measured"
        if self.limit is None:
            return "reported"
        return "met" if self.measured <= self.limit else "NOT MET"


def all_bars(layers: list[Row], models: list[Row], memory: list[Row], workers: list[Row]) -> list[Bar]:
    """Every bar.

    Args:
        layers: rows of layers.csv.
        models: rows of models.csv.
        memory: rows of memory.csv.
        workers: rows of workers.csv.

    Returns:
        The bars, in the order of the table.
    """
    kept = select(layers, allocator="kept")
    training = select(kept, mode="train", direction="both")
    return [
        *_against_batch_norm(training),
        *_each_shape(training),
        *_against_onednn(training),
        *_two_threads(select(kept, mode="train", variant="norm")),
        _mean_bar("BatchRenorm2d / plain code", 0.08, ratios(_alone(training), c.OURS, c.PLAIN)),
        *_against_copy(select(kept, mode="train", direction="forward", variant="norm")),
        *_models(select(models, allocator="kept", threads=1)),
        *_compiled(training, select(models, allocator="kept", threads=1)),
        *_groupings(_alone(training)),
        _memory(memory),
        *_inference(select(kept, mode="eval", direction="forward", threads=1)),
        *_workers(workers),
    ]


def _alone(training: list[Row]) -> list[Row]:
    return select(training, variant="norm", threads=1)


def _mean_bar(subject: str, limit: float | None, values: list[Ratio]) -> Bar:
    return Bar(subject, limit, mean(values), f"mean of {len(values)}; worst {worst(values)}" if values else "")


def _worst_bar(subject: str, limit: float, values: list[Ratio]) -> Bar:
    top = worst(values)
    above = sum(ratio.value > limit for ratio in values)
    if top is None:
        return Bar(subject, limit, None)
    return Bar(subject, limit, top.value, f"worst of {len(values)}, {above} above: {top}")


def _against_batch_norm(training: list[Row]) -> Iterator[Bar]:
    limits = {("norm", "contiguous"): 0.40, ("norm", "channels_last"): 0.60,
              ("norm+relu", "contiguous"): 0.40, ("norm+relu", "channels_last"): 0.55}  # fmt: skip
    for (variant, layout), limit in limits.items():
        rows = select(training, variant=variant, layout=layout, threads=1)
        yield _mean_bar(
            f"BatchRenorm2d / nn.BatchNorm2d, {variant}, {layout}", limit, ratios(rows, c.OURS, c.BATCH_NORM)
        )


def _each_shape(training: list[Row]) -> Iterator[Bar]:
    barred = [ratio for ratio in ratios(training, c.OURS, c.BATCH_NORM) if ratio.row["threads"] in _BARRED_THREADS]
    large = [ratio for ratio in barred if float(ratio.row["megabytes"]) >= _LARGE_MB]
    small = [ratio for ratio in barred if float(ratio.row["megabytes"]) < _LARGE_MB]
    yield _worst_bar("any input of 1 MB or more, 1 or 2 threads", 1.00, large)
    single = [ratio for ratio in large if ratio.row["threads"] == 1 and ratio.row["layout"] == "channels_last"]
    yield _worst_bar("any input of 1 MB or more, channels_last, 1 thread", 0.95, single)
    yield _worst_bar("any smaller input, 1 or 2 threads", 1.50, small)


def _against_onednn(training: list[Row]) -> Iterator[Bar]:
    for variant in ("norm", "norm+relu"):
        rows = select(training, variant=variant, threads=1)
        values = ratios(rows, c.OURS, c.ONEDNN)
        yield _mean_bar(f"BatchRenorm2d / oneDNN, {variant}, channels_last", 1.00, values)


def _two_threads(rows: list[Row]) -> Iterator[Bar]:
    """By the least of the rounds, which is the code's; the median is the machine's too."""
    large = [row for row in rows if float(row["megabytes"]) > _SPEED_UP_MB]
    for layout in LAYOUTS:
        values = between_threads(select(large, layout=layout, direction="both"), c.OURS)
        others = mean(between_threads(select(large, layout=layout, direction="forward"), c.COPY))
        remark = f"mean of {len(values)}; worst {worst(values)}; a copy {others:.2f}" if others and values else ""
        yield Bar(f"BatchRenorm2d, 2 threads / 1, over {_SPEED_UP_MB} MB, {layout}", 0.625, mean(values), remark)


def _against_copy(forward: list[Row]) -> Iterator[Bar]:
    large = [row for row in forward if float(row["megabytes"]) > _COPY_BOUND_MB and row["threads"] in _BARRED_THREADS]
    for layout, limit in zip(LAYOUTS, (1.5, 1.8), strict=True):
        values = ratios(select(large, layout=layout), c.OURS, c.COPY)
        yield _worst_bar(f"forward / copy, over 100 MB, {layout}", limit, values)


def _models(rows: list[Row]) -> Iterator[Bar]:
    limits = {("ResNet-18 CIFAR", c.OURS): 0.98, ("ResNet-18 CIFAR", c.OURS_FUSED): 0.96,
              ("ResNet-20 CIFAR", c.OURS_FUSED): 0.85, ("mobilenetv2_100", c.OURS_FUSED): 0.85}  # fmt: skip
    for (network, contender), limit in limits.items():
        values = ratios(select(rows, network=network), contender, c.BATCH_NORM)
        yield Bar(f"training step, {network}, {contender}", limit, mean(values))


def _compiled(layers: list[Row], models: list[Row]) -> Iterator[Bar]:
    values = ratios(layers, c.OURS_COMPILED, c.OURS)
    yield _mean_bar("BatchRenorm2d, compiled / eager, one layer", 1.00, values)
    for compiled, eager in ((c.OURS_COMPILED, c.OURS), (c.OURS_FUSED_COMPILED, c.OURS_FUSED)):
        yield _mean_bar(f"training step, {compiled} / eager", 1.00, ratios(models, compiled, eager))
        yield _mean_bar(f"training step, {compiled} / {c.BATCH_NORM_COMPILED}", 1.00,
                        ratios(models, compiled, c.BATCH_NORM_COMPILED))  # fmt: skip


def _groupings(alone: list[Row]) -> Iterator[Bar]:
    for grouping in (c.OUR_GHOST, c.OUR_BATCH_GROUP, c.OUR_GROUP):
        yield _mean_bar(f"{grouping} / {c.OUR_BATCH}", 1.15, ratios(alone, grouping, c.OUR_BATCH))
    for layout, limit in zip(LAYOUTS, (0.95, 0.50), strict=True):
        values = ratios(select(alone, layout=layout), c.OUR_GROUP, c.GROUP_NORM)
        yield _mean_bar(f"{c.OUR_GROUP} / {c.GROUP_NORM}, {layout}", limit, values)


def _memory(rows: list[Row]) -> Bar:
    return _worst_bar("saved for backward, norm + ReLU", 0.75, ratios(rows, c.OURS, c.BATCH_NORM, "saved_megabytes"))


def _inference(rows: list[Row]) -> Iterator[Bar]:
    yield _mean_bar("inference, alpha = 0 / nn.BatchNorm2d", 1.05, ratios(rows, c.OURS, c.BATCH_NORM))
    yield _mean_bar("inference, alpha = 0.1 / alpha = 0", None, ratios(rows, c.OURS_WEIGHTED, c.OURS))


def _workers(rows: list[Row]) -> Iterator[Bar]:
    two, one = select(rows, processes=2), select(rows, processes=1)
    merged = ratios(two, c.MERGED, c.BATCH_NORM)
    yield _mean_bar(f"ResNet-18 CIFAR, 2 workers, {c.MERGED} / nn.BatchNorm2d under DDP", 1.03, merged)
    for block in (c.ACCUMULATE, c.FREEZE, c.MONITOR):
        yield _mean_bar(f"ResNet-18 CIFAR, in {block} / in no block", None, ratios(one, block, c.NO_BLOCK))
