"""The runs of a sweep: a table of hyperparameters, one row for each run.

`Runs` is a dict of tensors (K,), so it is what `vmap` maps over. The name `seed` is of the random streams; runs that
differ in nothing else are one setting, of which means and error bars are taken.
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
    """A range to draw from evenly."""

    low: float
    high: float

    def at(self, part: Tensor) -> Tensor:
        """The values at these parts of the range, in [0, 1)."""
        return self.low + part * (self.high - self.low)


class LogUniform(NamedTuple):
    """A range above 0 to draw from evenly in the logarithm."""

    low: float
    high: float

    def at(self, part: Tensor) -> Tensor:
        """The values at these parts of the range, in [0, 1)."""
        return self.low * (self.high / self.low) ** part


class OneOf(NamedTuple):
    """Values to draw from evenly."""

    values: tuple[float, ...]

    def at(self, part: Tensor) -> Tensor:
        """The values at these parts of the list, in [0, 1)."""
        index = (part * len(self.values)).long().clamp(max=len(self.values) - 1)
        return torch.tensor(self.values, dtype=part.dtype)[index]


def grid(*, seeds: Sequence[int] = (0,), **values: Sequence[float]) -> Runs:
    """All combinations of some values, each with all seeds.

    Args:
        seeds: from 0, each once.
        values: by the hyperparameter's name, each at least one.

    Returns:
        Runs: the last name's values change fastest but for the seeds.

    Raises:
        ValueError: a list is empty, or a seed is negative or there twice.

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
    """Settings drawn at random, each with all seeds.

    Args:
        key: (2,).
        count: how many settings, at least 1.
        seeds: as in `grid`.
        ranges: by the hyperparameter's name.

    Raises:
        ValueError: a range is empty or, of logarithms, not above 0; `count` is below 1.

    Guarantees: setting i and each hyperparameter's values do not depend on `count`, or on the other ranges that follow.

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
    """Each row of some columns (settings,) once for each seed, one after the other."""
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
    """The number of each run's setting: (K,) int64. Runs that differ in their seed alone have one number.

    Example:
        >>> settings(grid(lr=[0.1, 0.2], seeds=[0, 1]))
        tensor([0, 0, 1, 1])
    """
    columns = zip(*[column.tolist() for name, column in runs.items() if name != SEED], strict=True)
    numbers: dict[tuple[float, ...], int] = {}
    found = [numbers.setdefault(row, len(numbers)) for row in columns]
    return torch.tensor(found or [0] * count(runs))
