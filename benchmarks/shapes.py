"""The inputs of the norm layers of known networks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# Batch sizes, and (channels, height = width) of every kind of norm layer.
_NETWORKS = {
    "ResNet-18 CIFAR": ((8, 32, 128), ((64, 32), (128, 16), (256, 8), (512, 4))),
    "ResNet-50": (
        (8, 32),
        ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)),
    ),
    "Inception-v3": ((4, 16), ((32, 149), (64, 147), (80, 73), (192, 71), (96, 35), (192, 17), (320, 8), (448, 8))),
}
# From cache to memory: measured with everything, where the others are measured with what the bars need.
_CORE = (
    (8, 512, 4, 4),
    (32, 256, 8, 8),
    (32, 64, 32, 32),
    (16, 192, 17, 17),
    (8, 256, 56, 56),
    (32, 256, 56, 56),
)
_QUICK = ((2, 16, 4, 4), (4, 32, 8, 8))


@dataclass(frozen=True)
class Shape:
    """An input.

    Args:
        network: that has a norm layer with this input.
        sizes: N, C, H and W.
        core: whether it is measured with everything.
    """

    network: str
    sizes: tuple[int, int, int, int]
    core: bool

    @property
    def name(self) -> str:
        """The sizes as text."""
        return "x".join(map(str, self.sizes))

    @property
    def megabytes(self) -> float:
        """Of a float32 tensor; a megabyte has 10^6 bytes."""
        return 4 * prod(self.sizes) / 1e6

    def tensor(self, layout: str) -> torch.Tensor:
        """A random tensor that wants a gradient.

        Args:
            layout: one of `LAYOUTS`.

        Returns:
            A leaf in the layout.
        """
        return torch.randn(self.sizes).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def shapes(quick: bool) -> list[Shape]:
    """All inputs.

    Args:
        quick: two tiny ones instead, to try the scripts.

    Returns:
        The inputs.
    """
    if quick:
        return [Shape("quick", sizes, core=index == 0) for index, sizes in enumerate(_QUICK)]
    return list(_layers())


def _layers() -> Iterator[Shape]:
    for network, (batches, features) in _NETWORKS.items():
        for batch in batches:
            for channels, size in features:
                sizes = (batch, channels, size, size)
                yield Shape(network, sizes, core=sizes in _CORE)
