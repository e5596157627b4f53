"""Masks that hooks hand to norm layers in other people's models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm

HIDDEN, FRAMES = 8, 12
LENGTHS = torch.tensor([12, 7, 4])
MASK = torch.arange(FRAMES) < LENGTHS[:, None]


def configuration(**options: Any) -> Any:
    return pytest.importorskip("transformers").Wav2Vec2ConformerConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, layerdrop=0.0,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        conformer_conv_dropout=0.0, **options,
    )  # fmt: skip


def wav2vec2() -> nn.Module:
    module = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")
    encoder: nn.Module = module.Wav2Vec2ConformerEncoder(configuration())
    return encoder


def with_masks(model: nn.Module) -> list[Tensor]:
    """Register the hooks of the page; the list fills with what the norm layers get."""
    current: dict[str, Any] = {}
    inputs: list[Tensor] = []

    def remember(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        current["mask"] = kwargs.get("attention_mask")

    def add_mask(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs.append(args[0].detach().clone())
        return args, kwargs | {"mask": current["mask"]}

    model.register_forward_pre_hook(remember, with_kwargs=True)
    for layer in model.modules():
        if isinstance(layer, renorm.Norm):
            layer.register_forward_pre_hook(add_mask, with_kwargs=True)
    return inputs


def test_padded_frames_of_a_conformer_do_not_touch_the_statistics() -> None:
    encoder = renorm.convert(wav2vec2(), renorm.BatchRenorm, momentum=1.0)
    inputs = with_masks(encoder)
    (layer,) = [module for module in encoder.modules() if isinstance(module, renorm.Norm)]
    encoder(torch.randn(3, FRAMES, HIDDEN), attention_mask=MASK)
    (x,) = inputs
    valid = x.movedim(1, -1)[MASK]  # (frames that count, C)
    torch.testing.assert_close(layer.running_mean, valid.mean(0))
    assert not torch.allclose(layer.running_mean, x.mean((0, 2)), atol=1e-3)


def test_what_padded_frames_hold_changes_neither_outputs_nor_gradients_nor_statistics() -> None:
    module = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")
    # a kernel of one frame, so that the convolution does not carry padded frames into others
    convolution = module.Wav2Vec2ConformerConvolutionModule(configuration(conv_depthwise_kernel_size=1))
    renorm.convert(convolution, renorm.BatchRenorm, limits=renorm.Limits.constant())
    layer = convolution.batch_norm
    layer.register_forward_pre_hook(lambda layer, args, kwargs: (args, kwargs | {"mask": MASK}), with_kwargs=True)
    x = torch.randn(3, FRAMES, HIDDEN, requires_grad=True)
    found = []
    for junk in (torch.zeros(HIDDEN), torch.randn(HIDDEN) * 1e3):
        layer.reset_running_stats()
        y = convolution(torch.where(MASK[..., None], x, junk))[MASK]
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        found.append((y.detach(), gradient, layer.running_mean.clone(), layer.running_var.clone()))
    torch.testing.assert_close(found[0], found[1])
    assert layer.num_batches_tracked == 1
