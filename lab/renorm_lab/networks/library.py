"""Networks of timm and torchvision, with our normalization layers in place of theirs."""

from __future__ import annotations

from functools import partial

from torch import nn

import renorm

_WITHOUT_AUXILIARY = ("inception_v3", "googlenet")  # torchvision's have a second output in training unless told


def library_model(
    name: str, image_shape: tuple[int, int, int], num_classes: int, norm: partial[renorm.Norm], pretrained: bool
) -> nn.Module:
    """A network of timm or torchvision.

    Args:
        name: timm/NAME or torchvision/NAME.
        image_shape: channels, height and width of the input.
        num_classes: number of outputs.
        norm: class and options of the normalization layers that replace batch norm.
        pretrained: whether to start from timm's weights, but for the last layer.

    Returns:
        A network from images, (N, C, H, W), to logits, (N, num_classes).

    Raises:
        ValueError: there is no such network or no such weights, it has no batch norm or takes no such images, or an
            option does not suit it.
    """
    library, _, rest = name.partition("/")
    if library == "timm":
        model = _timm(rest, image_shape[0], num_classes, pretrained)
    elif library == "torchvision":
        model = _torchvision(rest, image_shape[0], num_classes, pretrained)
    else:
        raise ValueError(f"model must be timm/NAME or torchvision/NAME, got {name}")
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ValueError(f"model must have batch norm layers to replace, {name} has none")
    to = renorm.BatchNorm if norm.func is renorm.Norm else norm.func
    return renorm.convert(model, to, report=lambda report: None, **norm.keywords)  # type: ignore[arg-type]


def _timm(name: str, in_channels: int, num_classes: int, pretrained: bool) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained, num_classes=num_classes, in_chans=in_channels)
    except (RuntimeError, OSError, KeyError) as error:  # unknown, without weights, or they cannot be downloaded
        raise ValueError(f"timm/{name}: {' '.join(str(error).split())}") from None
    return model


def _torchvision(name: str, in_channels: int, num_classes: int, pretrained: bool) -> nn.Module:
    import torchvision

    if pretrained:
        raise ValueError(f"pretrained weights are timm's: model must be timm/NAME, got torchvision/{name}")
    if in_channels != 3:
        raise ValueError(f"torchvision/{name} takes colour images, got {in_channels} channels")
    options = {"aux_logits": False, "init_weights": True} if name in _WITHOUT_AUXILIARY else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    return model
