"""The tables of the documentation, from the rows of the result files."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import contenders as c
from bars import Bar
from csvfiles import Row
from ratios import Ratio, mean, ratios, select
from shapes import LAYOUTS

_EAGER = (c.PLAIN, c.GROUP_NORM, c.ONEDNN, c.OURS)
_ALL = (c.BATCH_NORM_COMPILED, c.PLAIN, c.PLAIN_COMPILED, c.GROUP_NORM, c.OURS, c.OURS_COMPILED)
_EVERYWHERE = ("norm", "norm+relu")  # the variants that all inputs are measured with
_MISSING = "-"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], texts: Container[int] = (0,)) -> str:
    """A table in Markdown, which is also to be read as it is.

    Args:
        header: name of each column.
        lines: cells of each row.
        texts: which columns have text; the others have numbers.

    Returns:
        The table.
    """
    columns = list(zip(header, *lines, strict=True))
    aligned = [_aligned(column, index in texts) for index, column in enumerate(columns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*aligned, strict=True))


def _aligned(column: Sequence[str], text: bool) -> list[str]:
    """The cells of a column, padded, with the rule after the first."""
    width = max(map(len, column))
    rule = "-" * width if text else "-" * (width - 1) + ":"
    head, *cells = (cell.ljust(width) if text else cell.rjust(width) for cell in column)
    return [head, rule, *cells]


def bar_table(bars: Iterable[Bar]) -> str:
    """The bars, with what was measured."""
    lines = [[bar.subject, bar.verdict, _number(bar.measured), _number(bar.limit), bar.remark] for bar in bars]
    return markdown(["ratio", "verdict", "measured", "at most", "remark"], lines, texts=(0, 1, 4))


def training_rows(layers: list[Row], threads: int = 1) -> list[Row]:
    """The rows of forward and backward together, with kept memory."""
    return select(layers, allocator="kept", threads=threads, mode="train", direction="both")


def contender_table(layers: list[Row], threads: int) -> str:
    """Each contender over nn.BatchNorm2d, mean over all inputs."""
    return _ratio_table([row for row in training_rows(layers, threads) if row["variant"] in _EVERYWHERE], _EAGER)


def core_table(layers: list[Row]) -> str:
    """The same for the inputs that are measured with everything: compiled contenders and residuals too."""
    rows = training_rows(layers)
    core = {row["shape"] for row in rows if row["variant"] == "norm+residual"}
    return _ratio_table([row for row in rows if row["shape"] in core], _ALL)


def _ratio_table(rows: list[Row], names: Sequence[str]) -> str:
    lines = []
    for layout in LAYOUTS:
        for variant in dict.fromkeys(str(row["variant"]) for row in rows):
            chosen = select(rows, layout=layout, variant=variant)
            lines.append([layout, variant, *(_number(mean(ratios(chosen, name, c.BATCH_NORM))) for name in names)])
    return markdown(["layout", "layer", *names], lines, texts=(0, 1))


def network_table(layers: list[Row]) -> str:
    """Ours over nn.BatchNorm2d, by network, one thread."""
    rows = training_rows(layers)
    networks = list(dict.fromkeys(str(row["network"]) for row in rows))
    lines = []
    for layout in LAYOUTS:
        for variant in _EVERYWHERE:
            chosen = [select(rows, layout=layout, variant=variant, network=network) for network in networks]
            lines.append([layout, variant, *(_number(mean(ratios(one, c.OURS, c.BATCH_NORM))) for one in chosen)])
    return markdown(["layout", "layer", *networks], lines, texts=(0, 1))


def allocator_table(layers: list[Row], shape: str) -> str:
    """What an input costs with each allocator setting, in milliseconds and page faults, one thread."""
    rows = select(layers, shape=shape, layout="contiguous", mode="train", variant="norm", threads=1)
    lines = []
    for name in dict.fromkeys(str(row["contender"]) for row in select(rows, allocator="default")):
        direction = "forward" if name == c.COPY else "both"
        line = [name]
        for allocator in ("default", "kept"):
            (row,) = select(rows, contender=name, direction=direction, allocator=allocator)
            line += [_number(float(row["median_ms"])), f"{row['minor_faults']}"]
        lines.append(line)
    return markdown(["contender", "default, ms", "page faults", "kept, ms", "page faults"], lines)


def memory_table(memory: list[Row], shape: str) -> str:
    """Memory of norm + ReLU in multiples of the input."""
    lines = [
        [str(row["contender"]), *(_number(float(row[column]) / float(row["megabytes"]))
                                  for column in ("saved_megabytes", "peak_megabytes"))]
        for row in select(memory, shape=shape, layout="contiguous")
    ]  # fmt: skip
    return markdown(["norm + ReLU", "saved for backward", "peak of forward"], lines)


def model_table(models: list[Row], threads: int) -> str:
    """Images per second, and what ours costs over the nn.BatchNorm2d network."""
    rows = select(models, allocator="kept", threads=threads)
    names = list(dict.fromkeys(str(row["contender"]) for row in rows))
    lines = []
    for network in dict.fromkeys(str(row["network"]) for row in rows):
        chosen = {str(row["contender"]): row for row in select(rows, network=network)}
        first = chosen[names[0]]
        speeds = [f"{chosen[name]['images_per_second']:.1f}" if name in chosen else _MISSING for name in names]
        memory = [f"{row['peak_megabytes']:.0f}" for row in chosen.values()]
        lines.append([f"{network}, {first['batch']}x{first['size']}x{first['size']}", *speeds, " / ".join(memory)])
    return markdown(["network, input", *names, "peak memory in MB, same order"], lines)


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.2f}"


def worker_table(workers: list[Row]) -> str:
    """Time of a training step on several processes, and what the layers send."""
    lines = []
    for row in workers:
        below = c.NO_BLOCK if row["processes"] == 1 else c.BATCH_NORM
        (reference,) = select(workers, processes=row["processes"], contender=below)
        lines.append([
            str(row["processes"]), str(row["contender"]), f"{float(row['median_ms']):.0f}",
            f"{float(row['lower_quartile_ms']):.0f} to {float(row['upper_quartile_ms']):.0f}",
            f"{float(row['median_ms']) / float(reference['median_ms']):.2f}",
            str(row["collectives"]), f"{float(row['kilobytes']):.0f}",
        ])  # fmt: skip
    header = ["processes", "contender", "ms per step", "quartiles", "over the first", "collectives", "sent, kB"]
    return markdown(header, lines, texts=(1, 3))


def cost_table(costs: list[Row]) -> str:
    """What the layers of a worker send per step, for growing numbers of workers."""
    columns = ("gradients_megabytes", "running_megabytes", "batch_megabytes")
    lines = [
        [str(row["network"]), str(row["workers"]), *(f"{float(row[column]):.2f}" for column in columns),
         str(row["batch_collectives"])]
        for row in costs
    ]  # fmt: skip
    header = ["network", "workers", "gradients", "sync=running", "sync=batch", "its collectives"]
    return markdown(header, lines)


def crossq_table(steps: list[Row]) -> str:
    """What a gradient step of CrossQ takes with either layer, by units and phase."""
    lines = []
    for ours in select(steps, contender=c.RENORM):
        case = {name: ours[name] for name in ("units", "phase")}
        theirs = select(steps, contender=c.SB3_CONTRIB, **case)[0]
        lines.append([
            f"{case['units']:,}", str(case["phase"]), *(_number(float(row["median_ms"])) for row in (theirs, ours)),
            _number(float(ours["ratio"])),
            f"{float(ours['lower_quartile_ratio']):.2f} to {float(ours['upper_quartile_ratio']):.2f}",
        ])  # fmt: skip
    header = ["units", "phase", "sb3-contrib's layer, ms", "ours, ms", "ratio", "quartiles"]
    return markdown(header, lines, texts=(1, 5))


def small_table(small: list[Row]) -> str:
    """What a call of a small layer takes over nn.BatchNorm2d's, by size, and the geometric mean of all."""
    names = (c.OUR_BATCH, c.OURS)
    lines = []
    for phase in dict.fromkeys(str(row["phase"]) for row in small):
        ours = [select(small, phase=phase, contender=name) for name in names]
        for rows in zip(*ours, strict=True):
            case = [phase, str(rows[0]["layout"]), f"{rows[0]['shape']} ({rows[0]['kilobytes']} KB)"]
            below = select(small, phase=phase, layout=rows[0]["layout"], shape=rows[0]["shape"], contender=c.BATCH_NORM)
            microseconds = f"{1e3 * float(below[0]['median_ms']):.1f}"
            lines.append([*case, microseconds, *(_number(float(row["ratio"])) for row in rows)])
        means = [_number(mean(Ratio(float(row["ratio"]), row) for row in rows)) for rows in ours]
        lines.append([phase, "both", "geometric mean", "", *means])
    return markdown(["", "layout", "input", f"{c.BATCH_NORM}, us", *names], lines, texts=(0, 1, 2))


def export_table(exports: list[Row]) -> str:
    """What an example weight costs at inference, by network, batch and runtime."""
    lines = []
    for weighted in select(exports, contender=c.OURS_WEIGHTED):
        case = {name: weighted[name] for name in ("network", "batch", "size", "runtime")}
        rows = [*(select(exports, contender=name, **case)[0] for name in (c.BATCH_NORM, c.OURS)), weighted]
        lines.append([
            f"{case['network']}, {case['batch']}x{case['size']}x{case['size']}", str(case["runtime"]),
            *(_number(float(row["median_ms"])) for row in rows), _number(float(weighted["ratio"])),
            f"{float(weighted['lower_quartile_ratio']):.2f} to {float(weighted['upper_quartile_ratio']):.2f}",
            *(" / ".join(str(row[column]) for row in rows[1:]) if weighted[column] != "" else _MISSING
              for column in ("nodes", "optimized_nodes")),
        ])  # fmt: skip
    header = ["network, input", "runtime", f"{c.BATCH_NORM}, ms", "alpha = 0, ms", "alpha = 0.1, ms",
              "0.1 over 0", "quartiles", "nodes, 0 / 0.1", "optimized, 0 / 0.1"]  # fmt: skip
    return markdown(header, lines, texts=(0, 1, 6))
