"""Mean, variance and count of sets of numbers, and how they merge."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and statistics over numbers of a type: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Moments(NamedTuple):
    """Mean, biased variance and count of sets of elements.

    One type for ghost groups, masked examples, single examples at evaluation and whole batches.

    Args:
        mean: means, any shape, here mostly (groups, channels); float32 or float64.
        var: biased variances, the shape of `mean`.
        count: number of elements behind each mean, broadcastable to `mean`; same dtype.

    Example:
        >>> import torch
        >>> halves = Moments(torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [2.0]]))
        >>> halves.merged(dim=0)
        Moments(mean=tensor([2.5000]), var=tensor([2.7500]), count=tensor([4.]))
    """

    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # hides a method of tuples that nobody calls here

    def merged(self, dim: int) -> Moments:
        """Moments of the union of the sets along `dim`, weighted by their counts.

        Law of total variance: the mean of the variances plus the variance of the means. Sets without an
        element weigh nothing, whatever their mean and variance.

        Args:
            dim: dimension of `mean` to merge away.

        Returns:
            The moments, one dimension less.
        """
        if self.mean.shape[dim] == 1:
            return Moments(self.mean.squeeze(dim), self.var.squeeze(dim), self.count.squeeze(dim))
        total = self.count.sum(dim, keepdim=True)
        share = self.count / total.clamp(min=1)
        mean = (share * self.mean).sum(dim, keepdim=True)
        var = (share * (self.var + (self.mean - mean).square())).sum(dim)
        return Moments(mean.squeeze(dim), var, total.squeeze(dim))

    def finite(self) -> Tensor:
        """Whether the moments of each set are finite in all channels, (groups,) of (groups, channels)."""
        return (0 * (self.mean + self.var)).sum(-1) == 0  # 0 times anything else is not a number
