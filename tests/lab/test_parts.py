"""The parts of the lab, each by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import renorm
from renorm.lab.cli import main
from renorm.lab.data import load_dataset
from renorm.lab.evaluation import best_alpha, evaluate, set_example_weight
from renorm.lab.methods import norm_factory
from renorm.lab.models import build_model, resnet
from renorm.lab.recipes import RECIPES
from renorm.lab.recipes.noniid import NonIid
from renorm.lab.runs import Result, Run
from renorm.lab.summary import markdown_table, summarize
from renorm.lab.training import backward


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


def test_method_is_a_setting_of_norm():
    layer = norm_factory(run(limits=True, tracking="std", examples_per_group=4, channels_per_group=8))(64)
    assert layer.limits == renorm.Limits(3.0, 5.0, start=50, r_end=400, d_end=250)
    assert (layer.examples_per_group, layer.channels_per_group, layer.tracking) == (4, 8, "std")
    assert layer.momentum == 0.05


@pytest.mark.parametrize("name", ["mlp", "resnet8", "resnet20"])
def test_model_normalizes_by_the_given_layer(name: str):
    model = build_model(name, (3, 16, 16), 7, renorm.Norm)
    norms = [module for module in model.modules() if isinstance(module, renorm.Norm)]
    assert len(norms) == {"mlp": 4, "resnet8": 7, "resnet20": 19}[name]
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def test_resnet20_has_the_size_of_the_paper():
    assert sum(parameter.numel() for parameter in resnet(20, 3, 10, renorm.Norm).parameters()) == 269_722


def test_resnet_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="depth must be 8, 14, 20"):
        resnet(9, 3, 10, renorm.Norm)


def test_evaluation_leaves_the_model_as_it_was():
    dataset = load_dataset("digits", Path(), 8)
    model = build_model("mlp", dataset.image_shape, 10, renorm.Norm)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = evaluate(model, dataset, dataset.test)
    weighed = evaluate(model, dataset, dataset.test, alpha=1.0)
    assert plain != weighed
    assert evaluate(model, dataset, dataset.test) == plain
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
    losses = [backward(model, images, labels, size) for model, size in zip(models, (24, forward_size), strict=True)]
    torch.testing.assert_close(*losses)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    for one, other in zip(*(model.buffers() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_methods_of_a_seed_start_from_the_same_weights_and_see_the_same_batches():
    runs = NonIid(seeds=2).runs(load_dataset("digits", Path(), 8))
    assert len({run.key for run in runs}) == len(runs) == 6 * 2 * 2
    assert {(run.steps, run.lr, run.momentum, run.batch_size) for run in runs} == {(1_000, 0.05, 0.05, 32)}


@pytest.mark.parametrize("name", RECIPES)
def test_help_documents_every_option(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as status:
        main(["run", name, "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert "--data-root" in text
    assert "--data_root" not in text
    options = text.split("options:")[1].split("\n  --")[1:]
    assert all("default:" in " ".join(option.split()) for option in options)


def test_list_names_the_recipes(capsys: pytest.CaptureFixture[str]):
    assert main(["list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(RECIPES)


def test_error_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["run", "noniid", "--data", "missing.npz"]) == 1
    assert capsys.readouterr().err == "renorm: error: missing.npz: there is no such file\n"
