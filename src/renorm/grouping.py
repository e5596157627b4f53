"""Which elements share their statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Run(NamedTuple):
    """Consecutive example groups of the same size.

    Args:
        examples: which of the batch they are made of.
        groups: which of the batch's groups they are.
        number: how many there are.
    """

    examples: slice
    groups: slice
    number: int


@dataclass(frozen=True)
class Grouping:
    """A statistics group: some consecutive examples by some consecutive channels, all positions.

    Batch norm is the default; ghost batch norm sets `examples_per_group`; group norm is
    `Grouping(1, channels_per_group)`; batch-group norm sets both.

    Args:
        examples_per_group: consecutive examples that share statistics; None for the whole batch.
        channels_per_group: consecutive channels that share statistics; must divide the channels.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1.

    Source:
        Summers & Dinneen 2020, sections 3.2 (equation 4) and 3.4.

    Example:
        >>> Grouping(examples_per_group=4).parts(10)
        [(2, 4), (1, 2)]
        >>> Grouping(examples_per_group=4).parts(9)
        [(1, 4), (1, 5)]
    """

    examples_per_group: int | None = None
    channels_per_group: int = 1

    def __post_init__(self) -> None:
        _require_size("channels_per_group", self.channels_per_group)
        if self.examples_per_group is not None:
            _require_size("examples_per_group", self.examples_per_group)

    def is_plain(self, num_examples: int) -> bool:
        """Whether every channel of a batch is one group, as in batch norm.

        Args:
            num_examples: examples in the batch, at least 1.
        """
        return self.channels_per_group == 1 and self.parts(num_examples) == [(1, num_examples)]

    def parts(self, num_examples: int) -> list[tuple[int, int]]:
        """The example groups of a batch, as runs of equal groups.

        The examples that are left over form a smaller last group; a single one joins its predecessor,
        since one example says little of a spread.

        Args:
            num_examples: examples in the batch, at least 1.

        Returns:
            One or two pairs (number of groups, examples in each), in the order of the batch.
        """
        size = self.examples_per_group
        if size is None or size >= num_examples:
            return [(1, num_examples)]
        whole, rest = num_examples // size, num_examples % size  # divmod takes no symbolic sizes
        if rest == 0:
            return [(whole, size)]
        if rest > 1:
            return [(whole, size), (1, rest)]
        return [(whole - 1, size), (1, size + 1)] if whole > 1 else [(1, num_examples)]

    def runs(self, num_examples: int) -> list[Run]:
        """The same with their places in the batch.

        Args:
            num_examples: examples in the batch, at least 1.

        Returns:
            One or two runs, in the order of the batch.
        """
        runs, example, group = [], 0, 0
        for number, size in self.parts(num_examples):
            runs.append(Run(slice(example, example + number * size), slice(group, group + number), number))
            example, group = example + number * size, group + number
        return runs


def _require_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
