"""Compare the result files with the bars, and write the documentation's tables and plots.

python benchmarks/report.py [--results benchmarks/results] [--docs docs]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template

import tables
from bars import all_bars
from csvfiles import Row, read_machine, read_rows, replace_file
from plots import plot_copies, plot_models
from ratios import select

_HERE = Path(__file__).parent
_SUITES = ("layers", "models", "memory", "workers", "workers-cost", "export", "crossq", "small")
_EXAMPLE_MB = 8  # the size whose page faults the page shows


def page(results: Mapping[str, list[Row]], machine: Row) -> str:
    """The page of the documentation.

    Args:
        results: rows of each result file, by its name.
        machine: what layers.csv was measured on.

    Returns:
        The page, in Markdown.
    """
    layers, models, memory, workers, costs, exports, crossq, small = (results[name] for name in _SUITES)
    core = {str(row["shape"]): float(row["megabytes"]) for row in layers if row["variant"] == "norm+residual"}
    example = min(core, key=lambda shape: abs(core[shape] - _EXAMPLE_MB))
    return Template((_HERE / "page.md").read_text(encoding="utf-8")).substitute(
        machine=_machine_text(machine),
        bars=tables.bar_table(all_bars(layers, models, memory, workers)),
        contenders_one=tables.contender_table(layers, 1),
        other_threads=_with_more_threads(tables.contender_table, layers),
        networks=tables.network_table(layers),
        core=tables.core_table(layers),
        core_count=len(core),
        core_smallest=f"{min(core.values()):.3g}",
        core_largest=f"{max(core.values()):.3g}",
        example=f"{example} ({core[example]:.3g} MB)",
        allocator=tables.allocator_table(layers, example),
        memory=tables.memory_table(memory, example),
        models_one=tables.model_table(models, 1),
        other_models=_with_more_threads(tables.model_table, models),
        workers=tables.worker_table(workers),
        workers_cost=tables.cost_table(costs),
        export=tables.export_table(exports),
        crossq=tables.crossq_table(crossq),
        small=tables.small_table(small),
    )


def _with_more_threads(table: Callable[[list[Row], int], str], rows: list[Row]) -> str:
    """A table for each number of threads above one that was measured with kept memory."""
    counts = sorted({int(row["threads"]) for row in select(rows, allocator="kept")} - {1})
    return "\n\n".join(f"{count} threads:\n\n{table(rows, count)}" for count in counts)


def _machine_text(machine: Row) -> str:
    flags = ", ".join(flag for flag in ("avx2", "avx512f") if machine[flag] == "True")
    kernels = "with" if machine["renorm_kernels"] == "True" else "without"
    return (
        f"{machine['processor']}, {machine['cores']} cores ({flags}), {machine['memory_gb']} GB, {machine['libc']}, "
        f"torch {machine['torch']}, renorm {machine['renorm']} {kernels} its C++ kernels"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=_HERE / "results", help="folder of the CSV files")
    parser.add_argument("--docs", type=Path, default=_HERE.parent / "docs", help="folder of the page and its figures")
    options = parser.parse_args()
    results = {name: read_rows(options.results / f"{name}.csv") for name in _SUITES}
    print(tables.bar_table(all_bars(*(results[name] for name in ("layers", "models", "memory", "workers")))))
    plot_copies(options.docs / "figures" / "copies.png", results["layers"])
    plot_models(options.docs / "figures" / "models.png", results["models"])
    machine = read_machine(options.results / "layers-machine.csv")
    text = page(results, machine)
    replace_file(options.docs / "benchmarks.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
