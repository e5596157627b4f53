"""What the callbacks share."""

from __future__ import annotations

import pytest

import renorm
from renorm.integrations.training import require_one_process, set_limits


def test_only_layers_that_have_limits_get_them() -> None:
    import torch

    model = torch.nn.Sequential(renorm.BatchRenorm1d(3), renorm.BatchNorm1d(3), renorm.GhostBatchNorm1d(3, 2))
    set_limits(model, renorm.Limits.over, 260)
    assert [layer.limits for layer in model] == [renorm.Limits.over(260), None, None]


@pytest.mark.parametrize("batches", [0, -1, float("inf")])
def test_a_length_that_is_none_is_refused(batches: float) -> None:
    with pytest.raises(ValueError, match=f"got {batches}"):
        set_limits(renorm.BatchRenorm1d(3), renorm.Limits.over, batches)


def test_several_processes_are_not_weighed() -> None:
    require_one_process(1)
    with pytest.raises(ValueError, match="got 2: give weigh=None"):
        require_one_process(2)
