"""What fine-tuning starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from renorm_lab.data import Dataset
from renorm_lab.networks.network import make_network
from renorm_lab.recipes.finetune import Finetune
from renorm_lab.recipes.finetune_regression import FinetuneRegression
from renorm_lab.runs import Run
from renorm_lab.training.pretraining import prepare
from renorm_lab.training.train import Training


@pytest.fixture(scope="module")
def recipe() -> Finetune:
    """All methods in batches of 8."""
    return Finetune(batch_sizes=(8,), pretraining_steps=5, seeds=1, out=Path("nowhere"))


@pytest.fixture(scope="module")
def dataset(recipe: Finetune) -> Dataset:
    """As many classes to pretrain on as to fine-tune on."""
    return recipe.load()


def prepared(run: Run, dataset: Dataset) -> tuple[nn.Module, nn.Module, int]:
    """A network before and after, and the steps that it took."""
    torch.manual_seed(run.seed)
    before, after = make_network(run, dataset), make_network(run, dataset)
    after.load_state_dict(before.state_dict())
    steps: list[None] = []
    prepare(after, run, dataset, lambda: steps.append(None))
    return before, after, len(steps)


def test_every_method_of_a_seed_starts_from_the_same_weights_trained_once(recipe: Finetune, dataset: Dataset):
    runs = [run for run in recipe.runs(dataset) if run.examples_per_group is None or run.channels_per_group > 1]
    assert "group norm" in {run.method for run in runs}
    found = [prepared(run, dataset) for run in runs]
    assert [steps for *_, steps in found] == [5] + [0] * (len(runs) - 1)
    states = [after.state_dict() for _, after, _ in found]
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


def test_other_data_and_another_seed_are_trained_on_anew(recipe: Finetune, dataset: Dataset):
    run = recipe.runs(dataset)[0]
    prepared(run, dataset)
    assert prepared(replace(run, seed=7), dataset)[2] == 5
    assert prepared(run, recipe.load())[2] == 5


def test_the_last_layer_is_a_new_one_though_it_has_as_many_outputs(recipe: Finetune, dataset: Dataset):
    before, after, _ = prepared(recipe.runs(dataset)[0], dataset)
    assert torch.equal(before[-1].weight, after[-1].weight)
    assert not torch.equal(before[0].weight, after[0].weight)
    assert int(after[1].num_batches_tracked) == 5


def test_a_regression_starts_from_the_classifiers_weights(recipe: Finetune, dataset: Dataset):
    regression = FinetuneRegression(batch_sizes=(8,), pretraining_steps=5, seeds=1)
    data = replace(regression.load(), pretraining=dataset.pretraining)
    _, classifier, _ = prepared(recipe.runs(dataset)[0], dataset)
    _, regressor, steps = prepared(regression.runs(data)[0], data)
    assert steps == 0  # one pretraining serves both
    assert regressor[-1].out_features == 1
    assert torch.equal(classifier[0].weight, regressor[0].weight)


def test_frozen_statistics_stay_those_of_the_pretraining(tmp_path: Path):
    recipe = Finetune(
        methods=(), frozen_shares=(1.0,), batch_sizes=(8,), ghost_size=8, steps=3, average=0.0, pretraining_steps=5,
        seeds=1, logger="none", out=tmp_path,
    )  # fmt: skip
    dataset = recipe.load()
    (run,) = recipe.runs(dataset)
    training = Training(run, dataset, recipe)
    training.finish(lambda step: None)
    _, start, _ = prepared(run, dataset)
    found = training.trained.state_dict()
    for name, value in start.state_dict().items():
        assert torch.equal(value, found[name]) == ("running" in name or "num_batches" in name), name
