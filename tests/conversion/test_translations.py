"""What docs/coming-from.md says of other libraries' layers, against these libraries."""

from __future__ import annotations

import pytest
import torch

import renorm
from renorm import Limits


@pytest.mark.parametrize(("examples", "apart"), [(16, 0.033), (256, 0.002)])
def test_crossq_s_layer_divides_by_the_unbiased_variance(examples: int, apart: float) -> None:
    theirs = pytest.importorskip("sb3_contrib.common.torch_layers").BatchRenorm1d(4, warmup_steps=100_000)
    after = 100_001
    ours = renorm.BatchRenorm1d(4, eps=1e-3, limits=Limits(start=after, r_end=after, d_end=after), tracking="var")
    x = 3 * torch.randn(examples, 4)
    expected = theirs.train()(x) * (examples / (examples - 1)) ** 0.5
    torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-3)
    assert (examples / (examples - 1)) ** 0.5 - 1 == pytest.approx(apart, rel=0.05)
    for name, other in (("running_mean", theirs.ra_mean), ("running_var", theirs.ra_var)):
        torch.testing.assert_close(getattr(ours, name), other)


def test_crossq_s_layer_corrects_from_the_step_after_its_warm_up() -> None:
    theirs = pytest.importorskip("sb3_contrib.common.torch_layers").BatchRenorm1d(4, warmup_steps=3).train()
    ours = renorm.BatchRenorm1d(4, eps=1e-3, limits=Limits(start=4, r_end=4, d_end=4), tracking="var")
    corrected = []
    for step in range(6):
        x = 30 * torch.randn(5_000, 4) + 20
        y, expected = ours(x), theirs(x)
        torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)
        corrected.append(bool(expected.mean().abs() > 0.1))
        assert int(ours.num_batches_tracked) == step + 1
    assert corrected == [False] * 4 + [True] * 2


@pytest.mark.parametrize("step", [0, 4, 5, 9])
def test_torchrl_s_layer_is_a_switch_after_its_warm_up(step: int) -> None:
    theirs = pytest.importorskip("torchrl.modules").BatchRenorm1d(4, warmup_steps=5).train()
    ours = renorm.BatchRenorm1d(4, limits=Limits(start=5, r_end=5, d_end=5), tracking="var")
    theirs.num_batches_tracked.fill_(step)
    ours.num_batches_tracked.fill_(step)
    x = torch.randn(64, 4) + 1
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-4, atol=1e-5)


def test_tabnet_s_loop_forgets_as_one_update_with_the_momentum_of_the_page() -> None:
    theirs = pytest.importorskip("pytorch_tabnet.tab_network").GBN(4, virtual_batch_size=128, momentum=0.02).train()
    momentum, chunks = 0.02, 8
    ours = renorm.GhostBatchNorm1d(4, examples_per_group=128, momentum=1 - (1 - momentum) ** chunks)
    for layer in (theirs.bn, ours):
        layer.running_mean.fill_(1e4)
    x = torch.randn(128 * chunks, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_mean, theirs.bn.running_mean, rtol=1e-5, atol=0)


def test_theirs_cut_what_is_left_over_into_equal_chunks_ours_into_whole_ones_and_a_smaller() -> None:
    theirs = pytest.importorskip("pytorch_tabnet.tab_network").GBN(2, virtual_batch_size=16).train()
    x = torch.randn(40, 2)
    by_chunks = torch.cat([torch.nn.functional.batch_norm(part, None, None, training=True) for part in x.split(14)])
    torch.testing.assert_close(theirs(x), by_chunks, rtol=1e-4, atol=1e-4)
    assert [len(part) for part in x.split(14)] == [14, 14, 12]
    assert renorm.GhostBatchNorm1d(2, examples_per_group=16).grouping.parts(40) == [(2, 16), (1, 8)]
