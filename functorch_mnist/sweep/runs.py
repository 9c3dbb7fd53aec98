"""The runs of a sweep: a table of hyperparameters, one row for each run.

`Runs` is a dict of tensors (K,), which `vmap` maps over. The column `seed` names a run's random streams; runs that
differ only in their seed are repetitions of one setting, over which means and error bars are computed.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import random

Runs: TypeAlias = dict[str, Tensor]
"""Hyperparameters by name, (K,) each: float32 numbers, and `seed` int64."""

SEED = "seed"
"""The column of a table of runs that holds each run's seed."""


class Uniform(NamedTuple):
    """The uniform distribution on [low, high)."""

    low: float
    """The lower end."""
    high: float
    """The upper end, at least `low`."""

    def at(self, quantile: Tensor) -> Tensor:
        """The values at quantiles in [0, 1)."""
        return self.low + quantile * (self.high - self.low)


class LogUniform(NamedTuple):
    """The log-uniform distribution on [low, high)."""

    low: float
    """The lower end, above 0."""
    high: float
    """The upper end, at least `low`."""

    def at(self, quantile: Tensor) -> Tensor:
        """The values at quantiles in [0, 1)."""
        return self.low * (self.high / self.low) ** quantile


class OneOf(NamedTuple):
    """The uniform distribution over some values."""

    values: tuple[float, ...]
    """At least one."""

    def at(self, quantile: Tensor) -> Tensor:
        """The values at quantiles in [0, 1)."""
        index = (quantile * len(self.values)).long().clamp(max=len(self.values) - 1)
        return torch.tensor(self.values, dtype=quantile.dtype)[index]


def grid(*, seeds: Sequence[int] = (0,), **values: Sequence[float]) -> Runs:
    """All combinations of some values, each with all seeds.

    Args:
        seeds: whole numbers from 0, each once: repetitions of each setting.
        values: by the hyperparameter's name, a list of at least one number.

    Returns:
        Columns (K,) by name, float32, and `seed` int64. The seeds vary fastest, then the last name's values.

    Raises:
        ValueError: a list is empty, or a seed is negative or repeated.
        TypeError: a number in place of a list.

    Example:
        >>> grid(lr=[0.1, 0.2], seeds=[0, 1])
        {'lr': tensor([0.1000, 0.1000, 0.2000, 0.2000]), 'seed': tensor([0, 1, 0, 1])}
    """
    for name, column in values.items():
        if isinstance(column, (int, float, str)):
            raise TypeError(f"grid: {name} must be a list of numbers. Found {column!r}. Pass [{column!r}]?")
        if not len(column):
            raise ValueError(f"grid: each hyperparameter needs a value. Found none for {name}.")
    rows = list(itertools.product(*values.values()))
    columns = {
        name: torch.tensor([row[place] for row in rows], dtype=torch.float32) for place, name in enumerate(values)
    }
    return with_seeds(columns, seeds, settings=len(rows))


def random_search(
    key: Tensor, count: int, *, seeds: Sequence[int] = (0,), **ranges: Uniform | LogUniform | OneOf
) -> Runs:
    """Random search: settings drawn at random, each with all seeds.

    Args:
        key: (2,), of the draws.
        count: how many settings, at least 1.
        seeds: as in `grid`.
        ranges: by the hyperparameter's name, a distribution.

    Returns:
        Columns (K,) by name, K = count · seeds, float32, and `seed` int64.

    Raises:
        ValueError: a range is empty or, if logarithmic, not above 0; `count` is below 1.
        TypeError: a range is no `Uniform`, `LogUniform` or `OneOf`.

    Guarantees: setting i and each hyperparameter's values do not depend on `count`, or on the ranges that follow.

    Example:
        >>> random_search(random.key(0), 2, lr=LogUniform(0.01, 1.0))["lr"].shape
        torch.Size([2])

    Reference: Bergstra, Bengio, "Random search for hyper-parameter optimization", JMLR 13, 2012.
    """
    if count < 1:
        raise ValueError(f"random_search: count must be at least 1. Found {count}.")
    columns = {}
    for place, (name, one) in enumerate(ranges.items()):
        if isinstance(one, OneOf):
            good = len(one.values) > 0
        elif not isinstance(one, (Uniform, LogUniform)):
            raise TypeError(
                f"random_search: {name} must be a Uniform, LogUniform or OneOf. Found {one!r:.60}. "
                "Pass sweep.Uniform(low, high)?"
            )
        else:
            good = one.low <= one.high and (one.low > 0 or isinstance(one, Uniform))
        if not good:
            raise ValueError(
                f"random_search: a range must not be empty, and of logarithms above 0. Found {name} in {one}."
            )
        columns[name] = one.at(random.uniform(random.fold_in(key, place), (count,)))
    return with_seeds(columns, seeds, settings=count)


def with_seeds(columns: Mapping[str, Tensor], seeds: Sequence[int], *, settings: int) -> Runs:
    """Each row of some columns, repeated for each seed.

    Args:
        columns: by name, (S,) each.
        seeds: whole numbers from 0, each once.
        settings: S.

    Returns:
        Columns (S · seeds,), and `seed` int64, which varies fastest.

    Raises:
        ValueError: there is no seed, or one is negative or repeated.
        TypeError: `seeds` is a number.
    """
    if isinstance(seeds, int):
        raise TypeError(f"sweep: seeds must be a list. Found {seeds}. Pass range({seeds})?")
    if not len(seeds) or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"sweep: seeds must be different numbers from 0, at least one. Found {list(seeds)}.")
    runs = {name: column.repeat_interleave(len(seeds)) for name, column in columns.items()}
    return runs | {SEED: torch.tensor(list(seeds) * settings)}


def count(runs: Runs) -> int:
    """K, how many runs there are.

    Raises:
        ValueError: the columns differ in length, there is none, or there is no seed.
    """
    sizes = {tuple(column.shape) for column in runs.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1 or sizes == {(0,)} or SEED not in runs:
        raise ValueError(
            f"sweep: runs must be columns (K,), K at least 1, with seeds. Found {sorted(sizes)} of {list(runs)}."
        )
    return len(runs[SEED])


def settings(runs: Runs) -> Tensor:
    """Which setting each run is of.

    Args:
        runs: columns (K,).

    Returns:
        (K,) int64 from 0, in the order of first occurrence. Runs that differ only in their seed have one number.

    Example:
        >>> settings(grid(lr=[0.1, 0.2], seeds=[0, 1]))
        tensor([0, 0, 1, 1])
    """
    columns = zip(*[column.tolist() for name, column in runs.items() if name != SEED], strict=True)
    numbers: dict[tuple[float, ...], int] = {}
    of_each = [numbers.setdefault(row, len(numbers)) for row in columns]
    return torch.tensor(of_each or [0] * count(runs))
