"""Folding into convolutions: through to_batchnorm it gives the very network that nn.BatchNorm gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import renorm
from shipping.helpers import converted, fill, images, plain, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning"),
]
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def fold(model: nn.Module) -> nn.Module:
    """By torch.fx, the whole model."""
    from torch.fx.experimental import optimization  # warns when it is imported

    return optimization.fuse(model)


def norms_in(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (_BatchNorm, renorm.Norm))]


@pytest.mark.parametrize("fuse", [False, True])
def test_a_whole_model_folds_to_the_same_bits(fuse: bool) -> None:
    theirs = plain()
    ours = renorm.to_batchnorm(converted(theirs, fuse=fuse))
    folded = fold(ours)
    assert not norms_in(folded)
    same(folded, fold(theirs))


@pytest.mark.parametrize("fuse", [False, True])
def test_listed_modules_fold_to_the_same_bits(fuse: bool) -> None:
    theirs = plain()
    ours = renorm.to_batchnorm(converted(theirs, fuse=fuse))
    pairs = [["0", "1", "2"], ["3.conv1", "3.bn1"], ["3.conv2", "3.bn2"], ["6", "7"]]
    folded = fuse_modules(ours, pairs)
    assert not norms_in(folded)
    same(folded, fuse_modules(theirs, pairs))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_one_convolution_folds_to_the_same_bits(dimensions: int, transpose: bool, affine: bool) -> None:
    convolution = (TRANSPOSED if transpose else CONVOLUTIONS)[dimensions](3, 6, 3).eval()
    theirs = NORMS[dimensions](6, affine=affine).eval()
    fill(theirs)
    ours = renorm.to_batchnorm(converted(theirs))
    one, other = fuse_conv_bn_eval(convolution, ours, transpose), fuse_conv_bn_eval(convolution, theirs, transpose)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)
    x = torch.randn(2, 3, *[5] * dimensions)
    torch.testing.assert_close(one(x), converted(theirs)(convolution(x)), rtol=1e-5, atol=1e-5)


def test_a_linear_layer_folds_to_the_same_bits() -> None:
    linear, theirs = nn.Linear(3, 6).eval(), nn.BatchNorm1d(6).eval()
    fill(theirs)
    one, other = (fuse_linear_bn_eval(linear, norm) for norm in (renorm.to_batchnorm(converted(theirs)), theirs))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


@pytest.mark.parametrize("layer", [renorm.BatchNorm2d, renorm.BatchRenorm2d, renorm.GhostBatchNorm2d])
def test_a_layer_that_was_trained_folds_as_batch_norm_with_its_state(layer: Any) -> None:
    options = {"examples_per_group": 4} if layer is renorm.GhostBatchNorm2d else {}
    trained = layer(6, momentum=0.1, **options)
    for _ in range(5):
        trained(torch.randn(8, 6, 4, 4) * 3 + 1)
    theirs, convolution = nn.BatchNorm2d(6).eval(), nn.Conv2d(3, 6, 3).eval()
    theirs.load_state_dict(trained.state_dict())
    one, other = (fuse_conv_bn_eval(convolution, norm) for norm in (renorm.to_batchnorm(trained.eval()), theirs))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_groups_of_channels_fold(size: int) -> None:
    layer = renorm.BatchGroupNorm2d(6, num_groups=6 // size).eval()
    fill(layer)
    convolution, x = nn.Conv2d(3, 6, 3).eval(), images()
    expected = layer(convolution(x))
    folded = fuse_conv_bn_eval(convolution, renorm.to_batchnorm(layer))
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)


# --- an example weight cannot be folded -------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [False, True])
def test_an_example_weight_is_refused_by_layer_and_with_what_to_do(fuse: bool) -> None:
    ours = converted(plain(), 0.3, fuse=fuse)
    x = images()
    expected = ours(x)
    with pytest.raises(ValueError, match=r"(?s)1: example_weight=0.3.*3.bn1: example_weight=0.3.*set it to 0"):
        renorm.to_batchnorm(ours)
    assert torch.equal(ours(x), expected), "the model is as it was"


@pytest.mark.parametrize("example_weight", [0.0, 0.3])
def test_torchs_folding_of_a_model_leaves_our_layers_as_they_are(example_weight: float) -> None:
    ours = converted(plain(), example_weight)
    x = images()
    torch.testing.assert_close(fold(ours)(x), ours(x))


def test_torchs_folding_of_listed_modules_refuses_our_layers() -> None:
    with pytest.raises((AssertionError, NotImplementedError), match="BatchRenorm2d"):
        fuse_modules(converted(plain(), 0.3), [["0", "1"]])


# --- torch.compile's own folding --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("through_batchnorm", [True, False])
def test_freezing_gives_the_same_bits(through_batchnorm: bool) -> None:
    theirs = plain()
    ours = converted(theirs)
    if through_batchnorm:
        ours = renorm.to_batchnorm(ours)
    x = images()

    def frozen(model: nn.Module) -> Tensor:
        torch._dynamo.reset()
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            return torch.compile(copy.deepcopy(model))(x)

    assert torch.equal(frozen(ours), frozen(theirs))
