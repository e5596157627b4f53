"""The parts of the lab, each by itself."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn.functional import cross_entropy

import renorm
from renorm_lab.cli import main
from renorm_lab.data import load_dataset
from renorm_lab.jobs.progress_bar import RunProgress
from renorm_lab.networks.models import build_model, resnet
from renorm_lab.runs import Result, Run
from renorm_lab.summary import markdown_table, summarize, terminal_table
from renorm_lab.training.evaluation import best_alpha, evaluate, set_example_weight
from renorm_lab.training.ranks import make_fabric
from renorm_lab.training.train import backward


def run(**changes) -> Run:
    return Run(**{
        "recipe": "r", "data": "digits", "model": "mlp", "regime": "i.i.d.", "method": "batch norm", "tracking": "var",
        "limits": False, "examples_per_group": None, "channels_per_group": 1, "classes_per_batch": None,
        "examples_per_class": None, "batch_size": 32, "forward_size": None, "steps": 1_300, "lr": 0.05,
        "momentum": 0.05, "augment": False, "seed": 0,
    } | changes)  # fmt: skip


def result(off: float, on: float) -> Result:
    return Result(0.1, 0.0, 0.0, off, on, 0.0, 0.0, 0.0, ())


def test_alpha_is_the_best_on_validation_and_the_smaller_of_equals():
    assert best_alpha({0.0: 0.5, 0.1: 0.7, 0.2: 0.6}) == 0.1
    assert best_alpha({0.2: 0.7, 0.1: 0.7, 0.0: 0.6}) == 0.1
    assert best_alpha({0.0: 0.7, 0.1: 0.7}) == 0.0


def test_table_has_means_and_deviations_of_known_rows():
    results = {
        run(seed=0): result(0.40, 0.60),
        run(seed=1): result(0.42, 0.64),
        run(method="batch renorm", seed=0): result(0.70, 0.70),
        run(method="batch renorm", seed=1): result(0.70, 0.70),
    }
    lines = markdown_table(summarize(results)).splitlines()
    assert lines[0] == "| method | i.i.d., off | i.i.d., on |"
    assert lines[2] == "| batch norm | 41.0 ± 1.4 | 62.0 ± 2.8 |"
    assert lines[3] == "| batch renorm | 70.0 ± 0.0 | 70.0 ± 0.0 |"
    assert "over 2 seeds" in lines[-1]


def test_single_seed_has_no_deviation():
    assert "| batch norm | 40.0 | 60.0 |" in markdown_table(summarize({run(): result(0.4, 0.6)}))


@pytest.mark.parametrize("regimes", [1, 4])
def test_a_table_fits_a_terminal_of_80_columns_with_every_number(regimes: int):
    trained = (("training-mode training accuracy", 1.0),)
    results = {
        run(regime=f"n = {size}", method=method): replace(result(0.1 * size, 0.9), measures=trained)
        for size in range(1, regimes + 1)
        for method in ("batch norm", "batch-group norm + limits")
    }
    console = Console(width=80, record=True, file=StringIO())
    console.print(terminal_table(summarize(results, shows_training=True), "Title"))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for size in range(1, regimes + 1):
        assert f"{10 * size}.0" in text
    assert text.count("90.0") == 2 * regimes
    assert "…" not in text


def test_evaluation_leaves_the_model_as_it_was():
    dataset = load_dataset("digits", Path(), 8)
    model = build_model("mlp", dataset.image_shape, 10, renorm.Norm)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = evaluate(model, run(), dataset, dataset.test)
    weighed = evaluate(model, run(), dataset, dataset.test, alpha=1.0)
    assert plain != weighed
    assert evaluate(model, run(), dataset, dataset.test) == plain
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_example_weight_reaches_every_layer():
    model = resnet(8, 1, 10, renorm.Norm)
    set_example_weight(model, 0.3)
    assert {module.example_weight for module in model.modules() if isinstance(module, renorm.Norm)} == {0.3}


@pytest.mark.parametrize("forward_size", [4, 8, 12])
def test_a_minibatch_in_several_forwards_is_as_in_one(forward_size: int):
    """Statistics over 4 examples, one gradient of 24 and one update, as with the paper's workers."""
    models = [
        build_model(
            "mlp",
            (1, 8, 8),
            3,
            lambda c: renorm.Norm(c, limits=renorm.Limits.constant(), examples_per_group=4, tracking="std"),
        )
        for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    images, labels = torch.randn(24, 1, 8, 8), torch.arange(24) % 3
    fabric = make_fabric("cpu")
    losses = [
        backward(fabric, fabric.setup(model), cross_entropy, images, labels, size)
        for model, size in zip(models, (24, forward_size), strict=True)
    ]
    torch.testing.assert_close(*losses)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    for one, other in zip(*(model.buffers() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_error_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["run", "noniid", "--data", "missing.npz"]) == 1
    assert capsys.readouterr().err == "renorm: error: missing.npz: there is no such file\n"


def test_progress_moves_only_the_lines_whose_steps_have_changed(monkeypatch: pytest.MonkeyPatch):
    runs = [run(seed=seed, steps=4) for seed in range(3)]
    moved: list[int] = []
    monkeypatch.setattr(Progress, "update", lambda self, task, **changes: moved.append(task))
    with RunProgress(runs, 0, [2] * 3, visible=False) as progress:
        progress.show([1, 0, 0])
        progress.show([1, 2, 0])
    assert moved == [1, 0, 2, 0]  # 0 is the bar of all runs
