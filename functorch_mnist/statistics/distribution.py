"""The distribution of numbers, in memory that does not depend on how many there are.

Each number is counted in the bin of its value rounded to bfloat16: the 65,536 values of that type cover all of float32
with steps of 2^-8 of a value, so no range has to be known, the bins of any two parts are the same, and counts add up
exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import tree
from .folds import Sums

_BINS, _ZERO = 1 << 16, 1 << 15


@tree.register
@dataclass(frozen=True)
class Distribution(Sums):
    """A histogram of numbers, with their moments and quantiles.

    Distributions of two parts of a data set merge exactly, see `statistics.merge`.

    Example:
        >>> values = torch.tensor([1.0, 3.0])
        >>> Distribution.of(values, values > 0).mean
        tensor(2., dtype=torch.float64)
    """

    count: Tensor
    """0-d float64: how many numbers there are."""
    total: Tensor
    """0-d float64: their sum."""
    squares: Tensor
    """0-d float64: the sum of their squares."""
    minimum: Tensor
    """0-d float64: infinity where there is none."""
    maximum: Tensor
    """0-d float64: minus infinity where there is none."""
    bins: Tensor
    """(65536,) int64: how often each value of bfloat16 occurs, in the order of values."""

    @classmethod
    def of(cls, values: Tensor, keep: Tensor) -> Distribution:
        """The distribution of some numbers.

        Args:
            values: (B,) floats.
            keep: (B,) bool; a number with False is left out.
        """
        numbers = torch.where(keep, values.double(), 0.0)
        least = torch.where(keep, numbers, math.inf)
        most = torch.where(keep, numbers, -math.inf)
        bits = numbers.bfloat16().view(torch.int16).int()
        place = torch.where(bits < 0, _ZERO - 1 - (bits & 0x7FFF), _ZERO + bits).long()  # sign and magnitude
        bins = torch.zeros(_BINS, dtype=torch.int64, device=values.device).index_add(0, place, keep.long())
        none = numbers.new_zeros(1)  # so that an empty batch has a least and a most
        return cls(
            keep.sum().double(),
            numbers.sum(),
            numbers.square().sum(),
            torch.cat([least, none + math.inf]).amin(),
            torch.cat([most, none - math.inf]).amax(),
            bins,
        )

    def merge(self, other: Distribution) -> Distribution:
        added = super().merge(other)
        return Distribution(
            added.count,
            added.total,
            added.squares,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
            added.bins,
        )

    @property
    def mean(self) -> Tensor:
        """The mean, 0-d float64; NaN of no number."""
        return self.total / self.count

    @property
    def root_mean_square(self) -> Tensor:
        """The root of the mean square, 0-d float64; NaN of no number."""
        return (self.squares / self.count).sqrt()

    def quantile(self, q: float) -> Tensor:
        """The q-quantile: the least number that at least a fraction `q` of all numbers do not exceed.

        Args:
            q: from 0 to 1.

        Returns:
            0-d float64; NaN of no number.

        Guarantees: exactly that quantile of the numbers rounded to bfloat16, so within 2^-8 of the value relatively,
            for sizes from 1.2e-38 to 3.3e38. NaN counts as more than infinity.

        Raises:
            ValueError: `q` is not from 0 to 1.

        Example:
            >>> values = torch.arange(1.0, 101.0)
            >>> Distribution.of(values, values > 0).quantile(0.5)
            tensor(50., dtype=torch.float64)
        """
        if not 0 <= q <= 1:
            raise ValueError(f"quantile: q must be from 0 to 1. Found {q}.")
        reached = self.bins.cumsum(0)
        place = torch.searchsorted(reached, (q * self.count).ceil().clamp(min=1).long()).clamp(max=_BINS - 1)
        bits = torch.where(place < _ZERO, (_ZERO - 1 - place) | -_ZERO, place - _ZERO)
        value = bits.to(torch.int16).view(torch.bfloat16).double()
        return torch.where(self.count > 0, value, math.nan)
