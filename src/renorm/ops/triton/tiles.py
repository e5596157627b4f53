"""How a tensor is cut into tiles for the kernels, and the elements of a tile.

A tile is (elements, channels). Where channels come last it has several channels of some rows; where the positions of a
channel lie side by side it has some of these, of some examples, of a single channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ...grouping import Grouping

_TILE = 2048  # elements and channels together
_CHANNELS = 64  # where channels come last: 128 bytes in half precision
_RUN = 1024  # positions, where these lie side by side
_ON_CHIP = 16384  # what a program can hold: 32 registers of each of its threads, for each tensor
_ON_CHIP_CHANNELS = 16
_MOST_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 8


@dataclass(frozen=True)
class Layout:
    """Shape, memory format and grouping of a dense tensor.

    Args:
        examples: N.
        channels: C.
        positions: S, all positions of an example and channel.
        channels_last: whether memory holds (N, S, C) rather than (N, C, S).
        examples_per_group: of all groups but the last.
        groups: G.
        channels_per_group: k.
    """

    examples: int
    channels: int
    positions: int
    channels_last: bool
    examples_per_group: int
    groups: int
    channels_per_group: int

    @classmethod
    def of(cls, x: Tensor, grouping: Grouping) -> Layout:
        """The layout of a dense tensor, (N, C, *S); without positions its channels come last."""
        examples, channels = x.shape[:2]
        size = min(grouping.examples_per_group or examples, examples)
        whole, rest = divmod(examples, size)
        groups = whole + (rest > 1)  # a single one that is left joins its predecessor
        channels_last = x.movedim(1, -1).is_contiguous()
        return cls(examples, channels, x.shape[2:].numel(), channels_last, size, groups, grouping.channels_per_group)

    @property
    def largest_group(self) -> int:
        """Examples of the largest group."""
        last = self.examples - (self.groups - 1) * self.examples_per_group
        return max(last, self.examples_per_group) if self.groups > 1 else last


@dataclass(frozen=True)
class Cut:
    """Tiles, and the programs that share them.

    Args:
        elements: of a channel in a tile, a power of two.
        channels: of a tile, a power of two.
        run: positions of an example in a tile, a power of two; `elements` where channels come last.
        tiles: of a channel in the largest group.
        splits: programs that share a channel in a group.
        blocks: of channels.
    """

    elements: int
    channels: int
    run: int
    tiles: int
    splits: int
    blocks: int

    @property
    def warps(self) -> int:
        """Warps of a program: 8 elements for each of their threads, up to 32 where that takes too many."""
        return max(1, min(16, self.elements * self.channels // 256))


def whole_channels(layout: Layout) -> Cut | None:
    """The cut into tiles that hold a channel's elements in a group each.

    Args:
        layout: what is cut.

    Returns:
        The cut, None where a program cannot hold so much or a group has several channels.
    """
    if layout.channels_per_group > 1:
        return None
    if layout.channels_last:
        channels = min(triton.next_power_of_2(layout.channels), _ON_CHIP_CHANNELS)
        elements = run = triton.next_power_of_2(layout.largest_group * layout.positions)
    else:
        channels, run = 1, triton.next_power_of_2(layout.positions)
        elements = run * triton.next_power_of_2(layout.largest_group)
    if elements * channels > _ON_CHIP:
        return None
    return Cut(elements, channels, run, 1, 1, triton.cdiv(layout.channels, channels))


def tiles(layout: Layout, processors: int) -> Cut:
    """The cut into tiles of a fixed size, and programs enough to keep a device busy.

    Args:
        layout: what is cut.
        processors: of the device.

    Returns:
        The cut.
    """
    if layout.channels_last:
        channels = min(triton.next_power_of_2(layout.channels), _CHANNELS)
        rows = layout.largest_group * layout.positions
        elements = run = min(triton.next_power_of_2(rows), _TILE // channels)
        count = triton.cdiv(rows, elements)
    else:
        channels, run = 1, min(triton.next_power_of_2(layout.positions), _RUN)
        rows = min(triton.next_power_of_2(layout.largest_group), _TILE // run)
        elements = rows * run
        count = triton.cdiv(layout.largest_group, rows) * triton.cdiv(layout.positions, run)
    blocks = triton.cdiv(layout.channels, channels)
    wanted = triton.cdiv(_PROGRAMS_PER_PROCESSOR * processors, blocks * layout.groups)
    return Cut(elements, channels, run, count, max(1, min(wanted, count, _MOST_SPLITS)), blocks)


@triton.jit
def block_and_group(C, size):
    """Which block of channels and which group a program takes: both along the one axis without a limit of 65,535."""
    program, blocks = tl.program_id(0), tl.cdiv(C, size)
    group = program // blocks
    return program - group * blocks, group


@triton.jit
def group_bounds(g, N, per_group, G):
    """First example of group g, and the number of its examples."""
    begin = g * per_group
    return begin, tl.where(g == G - 1, N - begin, per_group)


@triton.jit
def tile_at(
    t, begin, examples, c, C, S, CHANNELS_LAST: tl.constexpr, E: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """Elements of tile t of a group for the channels c (BC,), each (E, BC): their offsets, those in the mask, and which
    exist."""
    e = tl.arange(0, E)
    if CHANNELS_LAST:
        row = t * E + e
        exists = row < examples * S
        at_mask = begin.to(tl.int64) * S + row
        offsets = at_mask[:, None] * C + c[None, :]
    else:
        runs = tl.cdiv(S, RUN)
        n = (t // runs) * (E // RUN) + e // RUN
        s = (t % runs) * RUN + e % RUN
        exists = (n < examples) & (s < S)
        n = (begin + n).to(tl.int64)
        at_mask = n * S + s
        offsets = (n[:, None] * C + c[None, :]) * S + s[:, None]
    exists = exists[:, None] & (c < C)[None, :]
    return offsets, tl.broadcast_to(at_mask[:, None], exists.shape), exists  # Triton 3.4 wants addresses for all
