"""Tools that count: operations, parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

import renorm

from .helpers import LIMITS, converted, images, network

KINDS: dict[str, Any] = {
    "batch norm": (renorm.BatchNorm, {}),
    "batch renorm": (renorm.BatchRenorm, {"limits": LIMITS["constant"]}),
    "ghosts": (renorm.GhostBatchNorm, {"examples_per_group": 2}),
    "fused": (renorm.BatchRenorm, {"fuse": True}),
}
each_kind = pytest.mark.parametrize(("to", "options"), KINDS.values(), ids=KINDS)
each_mode = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])


@each_kind
@each_mode
def test_torch_counts_the_same_operations(to: Any, options: Any, training: bool) -> None:
    plain, x = network(), images()
    totals = []
    for model in (plain, converted(plain, to, **options)):
        with FlopCounterMode(display=False) as counter:
            model.train(training)(x).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@each_kind
@each_mode
@pytest.mark.filterwarnings("ignore")  # the tracer's
def test_fvcore_counts_what_is_around_the_layers(to: Any, options: Any, training: bool) -> None:
    """At evaluation the layers too; in training they are many small operations, which fvcore counts nowhere."""
    fvcore = pytest.importorskip("fvcore.nn")
    plain, x = network(), images()
    counts = []
    for model in (plain, converted(plain, to, **options)):
        analysis = fvcore.FlopCountAnalysis(model.train(training), x).unsupported_ops_warnings(False)
        counts.append(dict(analysis.by_operator()))
    if training:
        del counts[0]["batch_norm"]
    assert counts[0] == counts[1]


@each_kind
def test_thop_counts_the_same_operations(to: Any, options: Any) -> None:
    thop = pytest.importorskip("thop")
    plain, x = network(), images()
    ours = converted(plain, to, **options)
    counts = [thop.profile(model, (x,), verbose=False) for model in (plain, ours)]
    assert counts[0] == counts[1]
    ours.train()(x).sum().backward()


@each_kind
def test_torchinfo_counts_the_same(to: Any, options: Any) -> None:
    torchinfo = pytest.importorskip("torchinfo")
    plain, x = network(), images()
    counts = []
    for model in (plain, converted(plain, to, **options)):
        summary = torchinfo.summary(copy.deepcopy(model), input_data=x, verbose=0)
        counts.append((summary.total_params, summary.trainable_params, summary.total_mult_adds))
    assert counts[0] == counts[1]
