"""How a tensor is cut for the kernels, and the elements of a tile.

To the kernels a dense tensor is a matrix: where channels come last, (N * S) rows of C columns; where the positions of
a channel lie side by side, N rows of C * S columns, several of them of one channel. Its rows are cut by groups of
examples and shared by programs, its columns into blocks of equal width that begin where vectors of 16 bytes do,
whatever the planes measure. So both layouts, and planes of 7 x 7, are read by whole vectors.

Where a program can hold all that a channel has in a group, it does, in a tile of its own shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from ...grouping import Grouping

_VECTOR_BYTES = 16  # what a thread loads at once
_THREADS_PER_WARP = 32
_WARPS = 8  # of a program
_WARPS_OF_PLANES = 4
_REGISTERS_PER_PROCESSOR = 65_536
# Of a thread. 80 leave room for 24 warps, which with four loads each have 48 KB on the way, twice what a processor of
# an H200 needs to keep its share of the memory busy.
REGISTERS, MORE_REGISTERS = 80, 128
REGISTERS_OF_PLANES = 168  # for the scan at the end
_CHANNELS = (64, 32, 16)  # of a tile where they come last: the widest that wastes no more than a fifth of it
_CHUNK = 4  # tiles that are loaded together
_WAVES = 4  # at least, where programs do not all fit on the device at once
_BYTES_PER_PARTIAL = 320  # of each column that a program reads, for the 16 bytes of its sums: 5%
_ON_CHIP_BYTES = 32_768  # what a program can hold of each tensor: 16 registers of each of its threads
_ON_CHIP_CHANNELS = 16


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
        positions = x.shape[2:].numel()
        channels_last = not (x.is_contiguous() and positions > 1)  # a single channel lies either way
        return cls(examples, channels, positions, channels_last, size, groups, grouping.channels_per_group)

    @property
    def largest_group(self) -> int:
        """Examples of the largest group."""
        last = self.examples - (self.groups - 1) * self.examples_per_group
        return max(last, self.examples_per_group) if self.groups > 1 else last

    @property
    def columns(self) -> int:
        """Of the matrix that the kernels see."""
        return self.channels if self.channels_last else self.channels * self.positions

    @property
    def rows(self) -> int:
        """Of the largest group in that matrix."""
        return self.largest_group * self.positions if self.channels_last else self.largest_group


@dataclass(frozen=True)
class WholeCut:
    """Tiles that hold a channel's elements in a group each.

    Args:
        elements: of a channel in a tile, a power of two.
        channels: of a tile, a power of two.
        run: positions of an example in a tile, a power of two; `elements` where channels come last.
        blocks: of channels.
        warps: of a program, whose threads hold 32 bytes of a tensor each, and more where that takes too many.
    """

    elements: int
    channels: int
    run: int
    blocks: int
    warps: int


def whole_channels(layout: Layout, itemsize: int) -> WholeCut | None:
    """The cut into tiles that hold a channel's elements in a group each.

    Args:
        layout: what is cut.
        itemsize: bytes of an element as it is computed with.

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
    size = elements * channels * itemsize
    if size > _ON_CHIP_BYTES:
        return None
    warps = max(1, min(16, size // (32 * _THREADS_PER_WARP)))
    return WholeCut(elements, channels, run, triton.cdiv(layout.channels, channels), warps)


@dataclass(frozen=True)
class Cut:
    """Tiles of one size, and programs that go over a share of the rows, tile by tile.

    Args:
        height: rows of a tile, a power of two.
        width: columns of a tile, a power of two.
        blocks: of columns.
        splits: programs that share the rows of a block in a group.
        share: rows of each of them.
        blocks_per_channel: that a channel lies in, at most.
        divisor: power of two up to 16 by which the number of columns can be divided.
        warps: of a program.
    """

    height: int
    width: int
    blocks: int
    splits: int
    share: int
    blocks_per_channel: int
    divisor: int
    warps: int

    @property
    def slots(self) -> int:
        """Partial results of a channel in a group, at most."""
        return self.splits * self.blocks_per_channel


def cut(layout: Layout, itemsize: int, processors: int, registers: int) -> Cut:
    """The cut into tiles of 16 bytes for each thread, and programs that keep a device busy.

    Args:
        layout: what is cut.
        itemsize: bytes of an element in memory.
        processors: of the device.
        registers: of a thread, which decide how many programs a processor holds.

    Returns:
        The cut.
    """
    warps = _WARPS if layout.channels_last else _WARPS_OF_PLANES
    lanes = warps * _THREADS_PER_WARP * _VECTOR_BYTES // itemsize
    width = min(_width_for(layout.channels), lanes) if layout.channels_last else lanes
    height = lanes // width
    blocks, rows = triton.cdiv(layout.columns, width), layout.rows
    resident = _REGISTERS_PER_PROCESSOR // (registers * _THREADS_PER_WARP * warps) * processors
    columns = blocks * layout.groups
    wanted = triton.cdiv(_WAVES * resident, columns)
    if columns <= resident:
        wanted = max(resident // columns, triton.cdiv(2 * processors, columns))
    least = _BYTES_PER_PARTIAL // itemsize if layout.channels_last else _CHUNK
    splits = max(1, min(wanted, rows // least))
    share = triton.cdiv(triton.cdiv(rows, splits), _CHUNK * height) * _CHUNK * height
    spans = 1
    if not layout.channels_last:
        spans = _most_blocks(layout.positions, width)
    return Cut(height, width, blocks, triton.cdiv(rows, share), share, spans, gcd(layout.columns, _VECTOR_BYTES), warps)


def _width_for(channels: int) -> int:
    """The widest tile that wastes at most a fifth of its lanes, else the one that wastes least."""
    if channels < _CHANNELS[-1]:
        return int(triton.next_power_of_2(channels))
    shares = {width: channels / (triton.cdiv(channels, width) * width) for width in _CHANNELS}
    return next((width for width, share in shares.items() if share >= 0.8), max(shares, key=lambda w: shares[w]))


def _most_blocks(positions: int, width: int) -> int:
    """Blocks that a channel's columns may lie in: those of `width` side by side do not begin where channels do."""
    if width % positions == 0:
        return 1
    return positions // width if positions % width == 0 else (positions - 2) // width + 2


@triton.jit
def block_and_group(blocks):
    """Which block of columns and which group a program takes: both along the one axis without a limit of 65,535."""
    program = tl.program_id(0)
    group = program // blocks
    return program - group * blocks, group.to(tl.int64)  # what it is multiplied by may be large


@triton.jit
def group_bounds(g, N, per_group, G):
    """First example of group g, and the number of its examples."""
    begin = g * per_group
    return begin, tl.where(g == G - 1, N - begin, per_group)


@triton.jit
def rows_of(g, split, N, S, per_group, G, share, PLANES: tl.constexpr):
    """Rows of a program: the group's first, the program's first (both of the matrix), and how many."""
    above, rows = group_bounds(g, N, per_group, G)
    if not PLANES:
        above *= S
        rows *= S
    first = tl.cast(split, tl.int64) * share
    return above, above + first, tl.maximum(tl.minimum(share, rows - first), 0).to(tl.int32)


@triton.jit
def columns_of(block, K, S, PLANES: tl.constexpr, W: tl.constexpr):
    """Columns of a block (W,): where they are, of which channel, and whether they exist."""
    column = block * W + tl.arange(0, W)
    channel = column
    if PLANES:
        channel = column // S
    return column, channel, column < K


@triton.jit
def tile_at(column, exists, rows, K, CHUNK: tl.constexpr, E: tl.constexpr):
    """Offsets of the elements of a chunk of tiles, (CHUNK, E, W), and which exist: of a single tile so many rows."""
    row = (tl.arange(0, CHUNK) * E)[:, None, None] + tl.arange(0, E)[None, :, None]
    there = exists[None, None, :]
    if CHUNK == 1:
        there = there & (row < rows)
    return row * K + column[None, None, :], there


@triton.jit
def counted_at(mask, first, column, channel, S, there, PLANES: tl.constexpr, CHUNK: tl.constexpr, E: tl.constexpr):
    """Which elements of a chunk count, by the mask (N, S); its first row is `first` of the matrix."""
    row = first + (tl.arange(0, CHUNK) * E)[:, None, None] + tl.arange(0, E)[None, :, None]
    at = row * S + (column - channel * S)[None, None, :] if PLANES else row + (column * 0)[None, None, :]
    return there & (tl.load(mask + at, mask=there, other=0) != 0)


@triton.jit
def whole_tile(begin, examples, c, C, S, CHANNELS_LAST: tl.constexpr, E: tl.constexpr, RUN: tl.constexpr):
    """Elements of the channels c (BC,) in a group, each (E, BC): offsets, those in the mask, and which exist."""
    e = tl.arange(0, E)
    if CHANNELS_LAST:
        exists = e < examples * S
        at_mask = begin * S + e
        offsets = at_mask[:, None] * C + c[None, :]
    else:
        n, s = e // RUN, e % RUN
        exists = (n < examples) & (s < S)
        n = begin + n
        at_mask = n * S + s
        offsets = (n[:, None] * C + c[None, :]) * S + s[:, None]
    exists = exists[:, None] & (c < C)[None, :]
    return offsets, tl.broadcast_to(at_mask[:, None], exists.shape), exists  # Triton 3.4 wants addresses for all
