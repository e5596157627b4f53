"""Weights that torch's tools compute anew in every forward: refused, with the call that ends it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import renorm


def pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.5)


def pruned_bias(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "bias", 0.5)


def parametrized(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", nn.Softplus(), unsafe=True)


def weight_normed(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer, dim=None)


def weight_normed_by_hook(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer, dim=None)


def spectrally_normed_by_hook(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer)


TOOLS = [pruned, pruned_bias, parametrized, weight_normed, weight_normed_by_hook, spectrally_normed_by_hook]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("make", "surgery", "done"),
    [
        (nn.BatchNorm1d, lambda model: renorm.convert(model, renorm.BatchRenorm), renorm.BatchRenorm1d),
        (renorm.BatchRenorm1d, renorm.to_batchnorm, nn.BatchNorm1d),
    ],
)
def test_they_are_refused_by_name_and_the_call_that_is_named_helps(
    tool: Callable[[nn.Module], None], make: Any, surgery: Callable[[nn.Module], nn.Module], done: type[nn.Module]
) -> None:
    model = nn.Sequential(make(4), make(4))
    tool(model[1])
    with pytest.raises(ValueError, match=r"cannot convert '1': its (weight|bias) is no parameter") as caught:
        surgery(model)
    assert type(model[0]) is make
    (call,) = re.findall(r"\): (torch\.nn\.utils\..*) makes it one", str(caught.value))
    x = torch.randn(6, 4)
    expected = model.eval()(x)
    exec(call, {"torch": torch, "model": model})
    assert [type(layer) for layer in surgery(model)] == [done] * 2
    torch.testing.assert_close(model(x), expected)


def test_a_weight_that_somebody_made_a_tensor_is_refused() -> None:
    layer = nn.BatchNorm1d(4)
    del layer.weight
    layer.weight = torch.ones(4)
    with pytest.raises(ValueError, match=r"model\.get_submodule\('0'\)\.weight = torch\.nn\.Parameter"):
        renorm.convert(nn.Sequential(layer), renorm.BatchRenorm)


def test_one_that_is_not_selected_is_no_obstacle() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    pruned(model[1])
    renorm.convert(model, renorm.BatchRenorm, where="0")
    assert isinstance(model[0], renorm.BatchRenorm1d)
