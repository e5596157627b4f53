"""Recipes: each runs, lists the papers' settings, and takes its defaults from a scale."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from renorm import Limits
from renorm_lab import recipes
from renorm_lab.cli import main
from renorm_lab.data import Dataset, Part, load_dataset
from renorm_lab.data.dataset import assemble
from renorm_lab.errors import LabError
from renorm_lab.jobs import job
from renorm_lab.networks.methods import METHODS, limits, norm_factory
from renorm_lab.networks.network import make_network
from renorm_lab.recipes import RECIPES
from renorm_lab.recipes.noniid import NonIid
from renorm_lab.runs import Run
from renorm_lab.training.batches import batches

from .conftest import at_scale

SLOW = ("decay", "allfour", "ablation", "negative")
WITHOUT_GHOST = ("baseline", "ablation", "combination", "decay", "smallbatch", "allfour", "negative", "tiles")


def test_a_file_is_a_recipe():
    files = sorted(path.stem for path in Path(recipes.__file__).parent.glob("[a-z]*.py"))
    assert [recipe.__module__ for recipe in RECIPES.values()] == [f"{recipes.__name__}.{file}" for file in files]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RECIPES])
def test_every_recipe_runs_at_tiny(name: str, tmp_path: Path):
    recipe = at_scale(RECIPES[name], "tiny", workers=1, out=tmp_path, logger="none")
    job.carry_out(recipe, "")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(recipe.runs(recipe.load()))
    assert max(float(row["test_accuracy_on"]) for row in rows) > 0.5  # of 10 classes
    assert (tmp_path / "table.md").read_text().startswith(f"# {recipe.title}")


@pytest.fixture(scope="module")
def images() -> Dataset:
    """As CIFAR-100 to a recipe: 100 classes in colour, with 32 images each."""
    labels = torch.arange(3_200) % 100
    part = Part(torch.zeros(3_200, 3, 32, 32, dtype=torch.uint8), labels)
    return assemble(part, part, part, "images")


def paper(name: str, images: Dataset, **options: Any) -> list[Run]:
    return at_scale(RECIPES[name], "paper", seeds=1, **options).runs(images)


def by_method(runs: list[Run]) -> dict[str, Run]:
    return {run.method: run for run in runs}


@pytest.mark.parametrize("name", ["baseline", "microbatch", "noniid", "ablation"])
def test_ioffe_trains_inception_as_the_paper(name: str, images: Dataset):
    for run in paper(name, images):
        assert (run.model, run.optimizer, run.steps) == ("torchvision/inception_v3", "rmsprop", 130_000)
        assert (run.train_gamma, run.average > 0.99) == (False, True)
        if name != "ablation":
            assert run.momentum == 0.01
            assert (run.batch_size, run.forward_size) == (1_600, 32)
        if run.limits and name != "ablation":
            assert (limits(run).start, limits(run).d_end, limits(run).r_end) == (5_000, 25_000, 40_000)
            assert (run.r_max, run.d_max) == (3.0, 5.0)


def test_ioffe_draws_16_labels_of_two_images_with_replacement(images: Dataset):
    runs = [run for run in paper("noniid", images) if run.classes_per_batch]
    assert {run.regime for run in runs} == {"16 classes x 2"}
    assert all((run.classes_per_batch, run.examples_per_class, run.replacement) == (16, 2, True) for run in runs)
    split = by_method(runs)["batch norm, split halves"]
    assert (split.order, split.examples_per_group, split.limits) == ("split", 16, False)


def test_microbatches_are_of_four(images: Dataset):
    runs = paper("microbatch", images)
    assert {(run.method, run.examples_per_group) for run in runs} == {
        (method, size) for method in ("batch norm", "batch renorm") for size in (32, 4)
    }


def test_table_1_has_its_rows(images: Dataset):
    runs = paper("noniid-classes", images)
    assert [(run.method, run.examples_per_group) for run in runs] == [
        ("batch norm", None), ("batch renorm", None),
        *((f"ghost batch norm, n = {n}", n) for n in (64, 32, 16, 8, 4, 2)), ("batch-group norm, n = 2", 2),
    ]  # fmt: skip
    for run in runs:
        assert (run.classes_per_batch, run.examples_per_class, run.replacement, run.batch_size) == (4, 32, True, 128)
        assert (run.model, run.data) == ("resnet18", "cifar100")


def test_ghost_sizes_halve_at_batch_128(images: Dataset):
    runs = paper("ghost", images)
    assert [run.examples_per_group for run in runs] == [None, 64, 32, 16, 8, 4, 2]
    assert {run.batch_size for run in runs} == {128}


def test_decay_goes_nowhere_to_zero_to_one_and_auto_in_inception_and_resnet(images: Dataset):
    runs = paper("decay", images)
    assert {run.norm_decay for run in runs} == {"none", "all", "one", "auto"}
    assert {run.model for run in runs} == {"torchvision/inception_v3", "torchvision/resnet50"}
    assert len({run.weight_decay for run in runs}) == 1


@pytest.mark.parametrize("name", ["smallbatch", "allfour", "combination", "finetune"])
def test_every_batch_size_sees_as_many_examples(name: str, images: Dataset):
    runs = RECIPES[name](seeds=1).runs(images)
    assert len({run.steps * run.batch_size for run in runs}) == 1
    assert len({run.lr / run.batch_size for run in runs}) == 1


def test_a_combination_is_named_by_what_it_is(images: Dataset):
    runs = RECIPES["combination"](seeds=1, group_size=4, batch_sizes=(8,)).runs(images)
    grouped = [run for run in runs if run.method.startswith("batch-group norm")]
    assert {run.method.partition(", ")[2] for run in grouped} == {"4 x 2", "4 x 4"}
    for run in grouped:
        assert run.method.endswith(f"{run.examples_per_group} x {run.channels_per_group}")
    renormed = {run.method: (run.tracking, run.r_max, run.d_max) for run in runs if run.tracking == "std" or run.limits}
    assert renormed["batch renorm, r to 1.5, d to 0.5"] == ("std", 1.5, 0.5)
    assert renormed["batch renorm, tracking total"] == ("total", 3.0, 5.0)


@pytest.mark.parametrize("name", ["smallbatch", "allfour", "combination"])
def test_every_method_can_be_asked_for(name: str, images: Dataset):
    methods = [method for method in METHODS if method != "ghost_batch_norm"]
    runs = RECIPES[name](seeds=1, methods=methods, batch_sizes=(8,)).runs(images)
    assert len({run.key for run in runs}) == len(runs)


def test_all_four_are_grouped_by_the_batch_size(images: Dataset):
    runs = {run.batch_size: run for run in paper("allfour", images) if run.method == "all four"}
    assert list(runs) == [128, 64, 32, 16, 8, 4, 2, 1]
    assert {size: run.examples_per_group for size, run in runs.items()} == {
        128: 16, 64: 16, 32: 16, 16: 8, 8: 4, 4: 2, 2: 2, 1: 1
    }  # fmt: skip
    assert [run.channels_per_group > 1 for run in runs.values()] == [False] * 6 + [True] * 2
    assert {run.norm_decay for run in runs.values()} == {"all"}


def test_batch_norm_of_one_example_is_left_out(images: Dataset):
    for name in ("smallbatch", "allfour"):
        runs = RECIPES[name](seeds=1).runs(images)
        assert min(run.batch_size for run in runs if run.method == "batch norm") == 2
        assert min(run.batch_size for run in runs) == 1


def test_finetuning_starts_from_pretrained_weights(images: Dataset):
    runs = paper("finetune", images)
    assert {(run.model, run.pretrained, run.pretraining_steps) for run in runs} == {("timm/resnet152", True, 0)}


def test_an_ablation_changes_one_setting(images: Dataset):
    runs = [run for run in paper("ablation", images) if run.regime == "i.i.d."]
    first, *others = runs
    names = [field.name for field in fields(Run) if field.name != "method"]
    changed = [[name for name in names if getattr(run, name) != getattr(first, name)] for run in others]
    assert sorted(map(len, changed)) == [0] + [1] * (len(others) - 1)  # momentum 0.01 is the paper's own
    assert {name for change in changed for name in change} == {
        "momentum", "plain_phase", "ramps", "r_max", "d_max", "tracking", "unclipped"
    }  # fmt: skip


def test_group_norm_is_evaluated_by_the_example_alone(images: Dataset):
    run = by_method(paper("weigh", images))["group norm"]
    assert (run.example_weight, run.examples_per_group, run.channels_per_group) == (1.0, 1, 8)
    assert norm_factory(run)(16).track_running_stats


def test_seeds_and_cells_are_distinct(images: Dataset):
    for name, recipe in RECIPES.items():
        for scale in recipe.scales:
            runs = at_scale(recipe, scale, seeds=2).runs(images)
            assert len({run.key for run in runs}) == len(runs), (name, scale)
            assert set(Counter((run.method, run.regime) for run in runs).values()) == {2}, (name, scale)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", Path(), 8)


def test_methods_of_a_seed_start_from_the_same_weights_and_see_the_same_batches(digits: Dataset):
    runs = NonIid(seeds=2).runs(digits)
    assert len({run.key for run in runs}) == len(runs) == 6 * 2 * 2
    assert {(run.steps, run.lr, run.momentum, run.batch_size) for run in runs} == {(1_000, 0.05, 0.05, 32)}
    seen: dict[tuple[int, str], set[tuple[float, ...]]] = {}
    for run in runs:
        torch.manual_seed(run.seed)
        weights = next(make_network(run, digits).parameters()).flatten().tolist()
        labels = next(batches(run, digits))[1].tolist()
        seen.setdefault((run.seed, run.regime), set()).add((*weights, *labels))
    assert [len(starts) for starts in seen.values()] == [1] * 4
    assert len(set.union(*seen.values())) == 4


@pytest.mark.parametrize("name", RECIPES)
def test_group_norm_is_of_single_examples_in_every_recipe(name: str, images: Dataset):
    runs = RECIPES[name](methods=("group_norm",)).runs(images)
    groups = {(run.examples_per_group, run.channels_per_group) for run in runs if run.method.startswith("group norm")}
    assert groups == {(1, 8)}


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(WITHOUT_GHOST)))
def test_ghost_batch_norm_has_a_size_in_every_recipe_that_takes_it(name: str, images: Dataset):
    runs = RECIPES[name](methods=("ghost_batch_norm",)).runs(images)
    groups = [run.examples_per_group for run in runs if run.method.startswith("ghost batch norm")]
    assert groups
    assert None not in groups


@pytest.mark.parametrize("name", WITHOUT_GHOST)
def test_ghost_batch_norm_without_a_size_is_refused(name: str, images: Dataset):
    with pytest.raises(LabError, match=f"methods of recipe {name} cannot be ghost_batch_norm"):
        RECIPES[name](methods=("ghost_batch_norm",)).runs(images)


def test_downloaded_weights_are_not_trained_before():
    recipe = RECIPES["finetune"](pretrained=True)
    dataset = recipe.load()
    assert dataset.pretraining is None
    assert {run.pretraining_steps for run in recipe.runs(dataset)} == {0}


def test_fine_tuned_batch_group_norm_has_its_groups(digits: Dataset):
    methods = ("batch_group_norm", "batch_group_renorm")
    runs = RECIPES["finetune"](methods=methods, group_size=4, batch_sizes=(8, 2)).runs(digits)
    groups = {(run.batch_size, run.examples_per_group) for run in runs if run.channels_per_group == 8}
    assert groups == {(8, 4), (2, 2)}


def test_fine_tuning_corrects_from_the_first_step_as_users_are_advised(digits: Dataset):
    runs = {run.method: run for run in RECIPES["finetune"]().runs(digits) if run.limits}
    assert limits(runs["batch renorm"]) == Limits.constant()
    assert limits(runs["batch renorm, r to 1.5, d to 0.5"]) == Limits.constant(1.5, 0.5)
    assert limits(runs["batch renorm, no limits"]) == Limits.constant(math.inf, math.inf)


def test_batch_norm_can_be_frozen_for_all_of_the_fine_tuning(digits: Dataset):
    runs = {run.method: run for run in RECIPES["finetune"](frozen_shares=(0.5, 1.0)).runs(digits)}
    frozen = {name: run.frozen_share for name, run in runs.items() if run.frozen_share}
    assert frozen == {"batch norm, frozen for the last 50%": 0.5, "batch norm, frozen": 1.0}


def test_all_four_are_where_a_batch_has_several_ghost_groups(digits: Dataset):
    runs = RECIPES["finetune"](ghost_size=4, batch_sizes=(8, 4, 2)).runs(digits)
    assert {(run.batch_size, run.examples_per_group) for run in runs if run.method == "all four, n = 4"} == {(8, 4)}


def test_rows_can_have_learning_rates_of_their_own_and_weights_are_averaged_over_as_many_examples(digits: Dataset):
    recipe = RECIPES["finetune"](lr=0.02, rates={"batch norm, frozen": 0.01}, batch_sizes=(8, 2), average=0.5)
    runs = {(run.method, run.batch_size): run for run in recipe.runs(digits)}
    rates = [runs[name, size].lr for name in ("batch norm", "batch norm, frozen") for size in (8, 2)]
    assert rates == pytest.approx([0.02, 0.005, 0.01, 0.0025])
    assert [runs["batch norm", size].average for size in (8, 2)] == pytest.approx([0.5, 0.5**0.25])


def test_a_regression_of_colours_starts_from_a_classifier():
    recipe = RECIPES["finetune-regression"]()
    dataset = recipe.load()
    assert dataset.train.labels.shape == (len(dataset.train), 1)  # digits are grey
    assert dataset.pretraining is not None
    assert dataset.pretraining.labels.dtype == torch.int64
    assert {run.objective for run in recipe.runs(dataset)} == {"regression"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["noniid", "--average", "1"], "average must be at least 0 and less than 1, got 1.0"),
        (["metric", "--batch-size", "4", "--examples-per-class", "[2, 8]"],
         "batch_size must be at least examples_per_class=8, got 4"),
        (["metric", "--classes", "5"], "classes cannot be 5 in recipe metric, which splits all classes: leave it out"),
        (["finetune", "--methods", "[]", "--frozen-shares", "[]", "--rates", '{"batch norm": 0.1}'],
         "rates must be of rows of the table (all four, n = 4), got batch norm"),
        (["noniid", "--classes", "11"], "digits: has 10 classes, fewer than classes=11"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_told_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["run", *arguments]) == 1
    assert capsys.readouterr().err == f"renorm: error: {message}\n"


@pytest.mark.parametrize("name", ["digits", "Digits"])
def test_digits_are_for_a_perceptron_however_they_are_written(name: str, digits: Dataset):
    assert {run.model for run in NonIid(data=name).runs(digits)} == {"mlp"}


def test_recipes_are_short_files():
    folder = Path(job.__file__).parent / "recipes"
    assert {path.name: lines for path in folder.glob("*.py") if (lines := path.read_text().count("\n")) >= 100} == {}


def test_every_recipe_has_every_scale():
    for recipe in RECIPES.values():
        assert set(recipe.scales) == {"tiny", "small", "paper"}
        for scale in recipe.scales:
            assert at_scale(recipe, scale).scale == scale
        assert at_scale(recipe, "small", steps=7).steps == 7


@pytest.mark.parametrize("name", RECIPES)
def test_help_documents_every_option(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as status:
        main(["run", name, "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert "--data-root" in text
    assert "--data_root" not in text
    options = text.split("--scale SCALE", 2)[2].split("\n  --")
    assert all("default:" in " ".join(option.split()) for option in options)
    assert all(len(option.split("(type:")[0].split()) > 3 for option in options)  # a description


def test_help_tells_the_defaults_of_a_scale(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["run", "noniid", "--scale", "paper", "--help"])
    assert "default: torchvision/inception_v3" in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def carried_out(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recipes that the command line hands over."""
    recipes: list[Any] = []
    monkeypatch.setattr("renorm_lab.cli.carry_out", lambda recipe, command: recipes.append(recipe))
    return recipes


@pytest.mark.parametrize("arguments", [["--scale=small", "--steps=5"], ["--steps", "5", "--scale", "small"]])
def test_options_override_the_scale(arguments: list[str], carried_out: list[Any]):
    assert main(["run", "ghost", *arguments]) == 0
    (recipe,) = carried_out
    assert recipe == at_scale(RECIPES["ghost"], "small", steps=5)


def test_without_a_scale_defaults_are_the_recipes_own(carried_out: list[Any]):
    assert main(["run", "noniid"]) == 0
    assert carried_out == [NonIid()]
    assert (NonIid().data, NonIid().steps, NonIid().seeds) == ("digits", 1_000, 3)


def test_unknown_scale_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["run", "noniid", "--scale", "huge"])
    assert "scale" in capsys.readouterr().err


def test_a_written_configuration_runs_again(tmp_path: Path, carried_out: list[Any], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["run", "metric", "--scale", "tiny", "--lr", "0.01", "--print-config"])
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["run", "metric", "--config", str(path), "--seeds", "2"]) == 0
    assert carried_out == [at_scale(RECIPES["metric"], "tiny", lr=0.01, seeds=2)]


@pytest.mark.parametrize("arguments", [[], ["--scale", "tiny"]])
def test_scale_of_a_configuration_gives_the_defaults_unless_the_command_line_has_one(
    arguments: list[str], tmp_path: Path, carried_out: list[Any]
):
    path = tmp_path / "config.yaml"
    path.write_text("scale: small\nlr: 0.02\n")
    assert main(["run", "ghost", *arguments, "--config", str(path)]) == 0
    assert carried_out == [at_scale(RECIPES["ghost"], "tiny" if arguments else "small", lr=0.02)]


def test_list_names_the_recipes_with_claim_and_source(capsys: pytest.CaptureFixture[str]):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == list(RECIPES)
    for line, recipe in zip(lines[1::2], RECIPES.values(), strict=True):
        assert recipe.claim in line
        assert recipe.source in line


def test_a_reader_that_has_seen_enough_is_no_error_to_tell_of():
    command = [sys.executable, "-m", "renorm_lab", "list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 1


def test_workers_hold_their_own_classes_and_average_over_all(images: Dataset):
    recipe = RECIPES["workers"](seeds=1, classes_per_worker=(4,), examples_per_class=2)
    regimes = {run.regime: run for run in recipe.runs(images) if run.method == "batch norm"}
    _, labels = next(batches(regimes["4 classes each"], images))
    assert labels.bincount().tolist() == [2] * 100  # the gradient is that of all classes
    assert all(len(group.unique()) == 4 for group in labels.split(regimes["4 classes each"].examples_per_group))
    assert regimes["synchronized"].examples_per_group == 200
    alone = RECIPES["workers"](seeds=1, classes_per_worker=(4,), synchronized=False).runs(images)
    assert {run.regime for run in alone} == {"4 classes each"}


def test_a_row_of_the_workers_may_have_a_learning_rate_of_its_own(images: Dataset):
    late = "batch norm, frozen for the last 50%"
    runs = RECIPES["workers"](rates={"group norm": 0.01, late: 0.3}, lr=0.2).runs(images)
    assert {(run.method, run.lr) for run in runs if run.lr != 0.2} == {("group norm", 0.01), (late, 0.3)}
    with pytest.raises(LabError, match=r"rates must be of rows of the table \(batch norm; .*\), got nothing"):
        RECIPES["workers"](rates={"nothing": 0.01}).runs(images)


def test_workers_say_in_words_what_their_figures_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--scale", "tiny", "--methods", "[batch_norm, batch_renorm_unlimited]", "--frozen-shares", "[]"]
    assert main(["run", "workers", *options, "--workers", "1", "--logger", "none", "--out", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    with (tmp_path / "results.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file) if row["regime"] == "1 class each"}
    off, on = (100 * float(rows["batch norm"][f"test_accuracy_{switch}"]) for switch in ("off", "on"))
    remedy = 100 * float(rows["batch renorm, no limits"]["test_accuracy_off"])
    assert "Trained where every worker sees 1 class, batch norm is right" in said
    assert f"in training and {off:.0f}% at evaluation, batch renorm without limits {remedy:.0f}%" in said
    assert said.endswith(f"weighing the trained batch-norm network, {on:.0f}%. Everything is in {tmp_path}")


def test_workers_hold_as_many_classes_each(images: Dataset):
    with pytest.raises(LabError, match="classes_per_worker must divide the 100 classes of digits, got 3"):
        RECIPES["workers"](classes_per_worker=(3,)).runs(images)
