"""Inference with and without an example weight, in eager mode and exported to ONNX Runtime; written to export.csv.

    python benchmarks/export.py [--quick] [--out benchmarks/results]

All contenders of a network and batch run interleaved in one process, one thread each; times are the processor's. Ratios
are over alpha = 0 in the same runtime, of two times of the same round, with median and quartiles of all rounds.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import renorm
from command import run
from contenders import BATCH_NORM, OURS, OURS_WEIGHTED
from csvfiles import Row
from harness import Budget, interleave, ratio
from networks import NETWORKS, QUICK_NETWORKS, Change, Network, ours
from settings import Setting
from steps import warm_step

EAGER, ONNX_RUNTIME = "eager", "ONNX Runtime"
_BATCHES, _QUICK_BATCHES = (1, 8), (2,)
_BUDGET = Budget(seconds=40, least_rounds=20, warmup=2)
_QUICK_BUDGET = Budget(seconds=0, least_rounds=3, warmup=1)
_ESTIMATED_ON = 16  # images


def _weighted(model: nn.Module) -> nn.Module:
    return renorm.convert(model, renorm.BatchRenorm, limits=renorm.Limits.constant(), example_weight=0.1)


CONTENDERS: dict[str, Change] = {BATCH_NORM: lambda model: model, OURS: ours, OURS_WEIGHTED: _weighted}


@dataclass(frozen=True)
class Exported:
    """A model in ONNX Runtime.

    Args:
        session: which runs it.
        nodes: of the graph in the file.
        optimized_nodes: of the graph that ONNX Runtime makes of it and runs.
    """

    session: onnxruntime.InferenceSession
    nodes: int
    optimized_nodes: int

    def __call__(self, images: Tensor) -> Tensor:
        """The model's output."""
        (output,) = self.session.run(None, {self.session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(output)


def exported(model: nn.Module, images: Tensor, threads: int) -> Exported:
    """Export a model for every batch size, as docs/shipping.md does.

    Args:
        model: at evaluation.
        images: an example of its input, with two images or more.
        threads: of ONNX Runtime.

    Returns:
        The model in ONNX Runtime.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, optimized = Path(folder, "model.onnx"), Path(folder, "optimized.onnx")
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = 3  # or it warns that the optimized file is for this machine alone
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return Exported(session, *(len(onnx.load(file).graph.node) for file in (path, optimized)))


def evaluated(network: Network) -> nn.Module:
    """A network at evaluation, with the running statistics that its weights ask for."""
    torch.manual_seed(0)
    model = network.build()
    images = torch.randn(_ESTIMATED_ON, 3, network.size, network.size)
    renorm.estimate(model, [images])
    return model.eval()


def measure(network: Network, batches: tuple[int, ...], setting: Setting, budget: Budget) -> Iterator[Row]:
    """Time the inference of a network.

    Args:
        network: the network.
        batches: numbers of images.
        setting: of this process.
        budget: how long for a batch.

    Yields:
        A row for each batch, runtime and contender.
    """
    model = evaluated(network)
    example = torch.randn(2, 3, network.size, network.size)
    models = {name: change(copy.deepcopy(model)) for name, change in CONTENDERS.items()}
    files = {name: exported(model, example, setting.threads) for name, model in models.items()}
    calls: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {(EAGER, name): model for name, model in models.items()}
    calls |= {(ONNX_RUNTIME, name): file for name, file in files.items()}
    for batch in batches:
        images = torch.randn(batch, 3, network.size, network.size)
        samples = interleave({case: warm_step(partial(call, images)) for case, call in calls.items()}, budget)
        for (runtime, name), sample in samples.items():
            file = files[name] if runtime == ONNX_RUNTIME else None
            yield {
                "network": network.name,
                "batch": batch,
                "size": network.size,
                "runtime": runtime,
                "contender": name,
                **sample.row("step"),
                **ratio(sample, samples[runtime, OURS]),
                "nodes": file.nodes if file else "",
                "optimized_nodes": file.optimized_nodes if file else "",
            }


def work(setting: Setting, quick: bool) -> Iterator[Row]:
    """Measure everything in this process."""
    for network in QUICK_NETWORKS if quick else NETWORKS:
        if network.barred:
            yield from measure(
                network, _QUICK_BATCHES if quick else _BATCHES, setting, _QUICK_BUDGET if quick else _BUDGET
            )


if __name__ == "__main__":
    run(__file__, __doc__, lambda quick: [Setting("kept", 1)], work, "onnx", "onnxruntime", "timm", "torchvision")
