"""Moments and how they merge; which elements share them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import example_groups
from torch import Tensor

from renorm import Moments
from renorm.grouping import Grouping


def moments_of(chunks: list[Tensor]) -> Moments:
    return Moments(
        torch.stack([chunk.mean() if len(chunk) else torch.zeros(()).double() for chunk in chunks])[:, None],
        torch.stack([chunk.var(correction=0) if len(chunk) else torch.zeros(()).double() for chunk in chunks])[:, None],
        torch.tensor([len(chunk) for chunk in chunks], dtype=torch.float64)[:, None],
    )


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any), st.integers(0, 1000))
def test_merged_moments_are_those_of_the_union(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chunks = [torch.randn(size, generator=generator, dtype=torch.float64) * (i + 1) + i for i, size in enumerate(sizes)]
    merged = moments_of(chunks).merged(0)
    union = torch.cat(chunks)
    torch.testing.assert_close(merged.mean[0], union.mean())
    torch.testing.assert_close(merged.var[0], union.var(correction=0))
    assert merged.count[0] == len(union)


def test_a_set_without_elements_weighs_nothing_whatever_it_says() -> None:
    full = Moments(torch.tensor([[3.0], [77.0]]), torch.tensor([[2.0], [99.0]]), torch.tensor([[4.0], [0.0]]))
    mean, var, count = full.merged(0)
    assert (mean.item(), var.item(), count.item()) == (3.0, 2.0, 4.0)


def test_nothing_merged_with_nothing_is_finite() -> None:
    empty = Moments(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1))
    assert all(moment.isfinite().all() for moment in empty.merged(0))


def test_counts_broadcast_over_channels() -> None:
    moments = Moments(torch.tensor([[0.0, 1.0], [3.0, 5.0]]), torch.zeros(2, 2), torch.tensor([[1.0], [2.0]]))
    merged = moments.merged(0)
    torch.testing.assert_close(merged.mean, torch.tensor([2.0, 11 / 3]))
    torch.testing.assert_close(merged.var, torch.tensor([2.0, 32 / 9]))


def test_a_variance_between_far_means_does_not_cancel() -> None:
    moments = Moments(torch.tensor([[1e4], [1e4 + 2]]), torch.ones(2, 1), torch.full((2, 1), 8.0))
    assert moments.merged(0).var.item() == 2.0


@given(st.integers(1, 40), st.none() | st.integers(1, 45))
def test_example_groups_are_consecutive_and_a_single_left_over_joins(num_examples: int, size: int | None) -> None:
    sizes = [n for count, n in Grouping(size).parts(num_examples) for _ in range(count)]
    assert sizes == [len(group) for group in example_groups(num_examples, size)]


@pytest.mark.parametrize(
    ("num_examples", "size", "sizes"),
    [
        (8, None, [8]),
        (8, 8, [8]),
        (8, 9, [8]),
        (8, 4, [4, 4]),
        (8, 3, [3, 3, 2]),
        (7, 3, [3, 4]),
        (9, 2, [2, 2, 2, 3]),
        (3, 2, [3]),
        (3, 1, [1, 1, 1]),
        (1, 1, [1]),
        (1, 4, [1]),
    ],
)
def test_example_groups_by_hand(num_examples: int, size: int | None, sizes: list[int]) -> None:
    assert [n for count, n in Grouping(size).parts(num_examples) for _ in range(count)] == sizes
