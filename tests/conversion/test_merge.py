"""One state dict of several: statistics are those of all data, weights are averaged or left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), renorm.BatchRenorm2d(8, tracking="total"), nn.ReLU(), nn.Flatten(1))


def clients(number: int, sizes: list[int]) -> list[Tensor]:
    """Data of clients that lie apart."""
    torch.manual_seed(1)
    return [torch.randn(size, 1, 6, 6) * (1 + i) + 5 * i for i, size in zip(range(number), sizes, strict=True)]


def estimated(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    renorm.estimate(model, batches)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_statistics_are_those_of_the_united_data() -> None:
    sizes = [4, 8, 20]
    data = clients(3, sizes)
    found = renorm.merge([estimated(network(), [x]) for x in data], counts=sizes)
    expected = estimated(network(), [torch.cat(data)])
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    for name in ("0.weight", "0.bias", "1.weight"):
        torch.testing.assert_close(found[name], expected[name])


def test_an_average_of_variances_loses_what_lies_between() -> None:
    states = [estimated(network(), [x]) for x in clients(3, [8, 8, 8])]
    averaged = torch.stack([state["1.running_var"] for state in states]).mean(0)
    assert float(renorm.merge(states)["1.running_var"].mean()) > 2 * float(averaged.mean())


def test_weights_are_averaged_by_counts_and_steps_go_on_where_the_furthest_is() -> None:
    states = [{"w": torch.tensor([float(i)]), "steps": torch.tensor(i)} for i in range(3)]
    assert renorm.merge(states, counts=[1, 0, 3]) == {"w": torch.tensor([1.5]), "steps": torch.tensor(2)}


@pytest.mark.parametrize(
    ("what", "kept"),
    [
        (
            "all",
            {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"},
        ),
        ("statistics", {"1.running_mean", "1.running_var", "1.num_batches_tracked"}),
        ("shared", {"0.weight", "0.bias"}),
    ],
)
def test_what_is_left_out_stays_the_clients_own(what: Any, kept: set[str]) -> None:
    model = network()
    found = renorm.merge([network().state_dict(), network().state_dict()], what=what)
    assert found.keys() == kept
    model.load_state_dict(found, strict=False)


def test_dtypes_stay_and_a_client_that_does_not_count_may_be_anything() -> None:
    good, bad = nn.BatchNorm1d(2).half().state_dict(), nn.BatchNorm1d(2).half().state_dict()
    bad["running_mean"] = torch.full((2,), torch.nan, dtype=torch.float16)
    found = renorm.merge([good, bad], counts=[3, 0])
    assert found["running_mean"].dtype == torch.float16
    assert bool(found["running_mean"].isfinite().all())
    assert bool(found["running_var"].isfinite().all())


@pytest.mark.parametrize(
    ("states", "options", "words"),
    [
        ([], {}, "at least one, got none"),
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], {}, "another 'a' in number 1"),
        ([{"a": torch.ones(1)}, {"a": torch.ones(2)}], {}, "another 'a' in number 1"),
        ([{"a": torch.ones(1)}], {"counts": [1, 2]}, r"one number of at least 0 for each of the 1 .*got \[1, 2\]"),
        ([{"a": torch.ones(1)}], {"counts": [-1]}, "at least 0"),
        ([{"a": torch.ones(1)}], {"counts": [0]}, "not all 0"),
        ([{"a": torch.ones(1)}], {"what": "everything"}, "got 'everything'"),
    ],
)
def test_what_cannot_be_merged_is_refused(states: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        renorm.merge(states, **options)
