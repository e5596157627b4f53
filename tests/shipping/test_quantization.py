"""int8 through torchao's PT2E: batch norm is folded on the way, ours to the same bits as torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.modules.batchnorm import _BatchNorm

import renorm

pytest.importorskip("torchao", minversion="0.15")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]
DIGITS = load_digits()
X = torch.as_tensor(DIGITS.images, dtype=torch.float32).unsqueeze(1) / 16
Y = torch.as_tensor(DIGITS.target)
TRAIN, HELD_OUT = slice(0, 1_200), slice(1_200, None)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network trained with batch renormalization, at evaluation."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
    ]  # fmt: skip
    model = renorm.convert(nn.Sequential(*layers), renorm.BatchRenorm, momentum=0.05, limits=renorm.Limits.over(200))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        chosen = torch.randint(1_200, (64,))
        loss = nn.functional.cross_entropy(model(X[TRAIN][chosen]), Y[TRAIN][chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def quantized(model: nn.Module) -> nn.Module:
    """int8 weights by channel and activations by tensor, calibrated on the training images."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    program = torch.export.export(model, (X[:4],), dynamic_shapes=({0: Dim("batch")},))
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for x in X[TRAIN].split(100):
            prepared(x)
    return convert_pt2e(prepared)


def operations(model: nn.Module) -> list[str]:
    return [str(node.target) for node in model.graph.nodes if node.op == "call_function"]


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X[HELD_OUT])


@pytest.fixture(scope="module")
def int8(trained: nn.Module) -> nn.Module:
    return quantized(renorm.to_batchnorm(copy.deepcopy(trained)))


def test_no_normalization_is_left(int8: nn.Module) -> None:
    assert not [name for name in operations(int8) if "norm" in name]
    assert not [module for module in int8.modules() if isinstance(module, (_BatchNorm, renorm.Norm))]
    assert sum("quantize_per_channel" in name for name in operations(int8)) == 3  # convolutions, and the linear layer


def test_outputs_are_close_to_those_in_float(trained: nn.Module, int8: nn.Module) -> None:
    expected, found = outputs(trained), outputs(int8)
    # Eight bits resolve a tensor's range to 1/255, half a step off at most, in each of the four tensors on the way and
    # their weights; errors of single products are independent and average out.
    assert (found - expected).square().mean().sqrt() < 0.03 * expected.std()
    accuracies = [(out.argmax(1) == Y[HELD_OUT]).double().mean() for out in (expected, found)]
    assert accuracies[0] > 0.9
    assert accuracies[1] > accuracies[0] - 0.01


def test_it_is_bit_for_bit_what_batch_norm_gives(trained: nn.Module, int8: nn.Module) -> None:
    theirs = nn.Sequential(*[
        nn.BatchNorm2d(module.num_features) if isinstance(module, renorm.Norm) else copy.deepcopy(module)
        for module in trained
    ])  # fmt: skip
    theirs.load_state_dict(trained.state_dict())
    expected = quantized(theirs.eval())
    assert operations(int8) == operations(expected)
    assert torch.equal(outputs(int8), outputs(expected))


def test_without_an_example_weight_our_layers_fold_as_they_are(trained: nn.Module, int8: nn.Module) -> None:
    assert torch.equal(outputs(quantized(trained)), outputs(int8))


def test_with_an_example_weight_the_layers_stay_in_float_between_the_convolutions(trained: nn.Module) -> None:
    weighing = copy.deepcopy(trained)
    for module in weighing.modules():
        if isinstance(module, renorm.Norm):
            module.example_weight = 0.2
    found = quantized(weighing)
    assert "aten.rsqrt.default" in operations(found)
    assert (outputs(found) - outputs(weighing)).square().mean().sqrt() < 0.03 * outputs(weighing).std()
