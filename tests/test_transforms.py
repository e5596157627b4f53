"""The one custom operation keeps torch's rules for custom operations."""

import pytest
import torch

from renorm.transforms import snapshot


@pytest.mark.parametrize(
    "tensor", [torch.ones(3), torch.tensor(7), torch.ones(4).double()], ids=["float", "step", "double"]
)
def test_the_operation_passes_torchs_own_check(tensor):
    torch.library.opcheck(torch.ops.renorm.snapshot.default, (tensor,))


def test_eager_code_gets_the_buffer_itself():
    buffer = torch.randn(3)
    assert snapshot(buffer) is buffer
