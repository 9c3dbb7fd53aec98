"""Sums over examples, how they merge, and the fold that takes them in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import batch as batches
from .. import tree
from ..arguments import check_fn, check_params, check_takes, shown
from ..distributed import SINGLE_PROCESS, World, all_gather
from ..distributed.rows import split_rows
from ..distributed.sums import pairwise_sum
from ..per_sample import Factored, Plan, factored
from ..tree import Tree

S = TypeVar("S")
Self = TypeVar("Self", bound="Sums")


class Sums:
    """A statistic as sums over examples: a registered dataclass of tensors.

    A subclass has a class method `of(gradients) -> Sums`, which `fold` takes, and overrides `merge` where its fields
    are not merged by addition.
    """

    def merge(self: Self, other: Self) -> Self:
        """The statistic over the examples of both.

        Args:
            other: of the same class and parameters.

        Raises:
            ValueError: they are of different parameters.
        """
        shapes = [[tuple(leaf.shape) for leaf in tree.leaves(sums)] for sums in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"merge: two of the same parameters. Found shapes {shapes[0]} and {shapes[1]}.")
        return tree.map(torch.add, self, other)


class Gradients:
    """The gradients of a chunk of B examples, as a statistic takes them. What several statistics need is computed once.

    `factors` and `factored` are the factored gradients of `per_sample.factored`, `keep` (B,) bool is the mask.
    """

    def __init__(self, factored: Factored, keep: Tensor) -> None:
        self.factors = factored
        """The factored gradients of the chunk. Exactly zero where masked."""
        self.factored = factored.built()
        """The same gradients, in the form in which inner products are cheapest."""
        self.keep = keep
        """(B,) bool: which examples count."""
        self._square_norms: list[Tensor] | None = None
        self._total: Tree = None

    @property
    def count(self) -> Tensor:
        """0-d float64: how many examples count."""
        return self.keep.sum().double()

    @property
    def square_norms(self) -> list[Tensor]:
        """The squared norm of each parameter's part of ∇_i, (B,) float64 each, in the order of `tree.leaves`."""
        if self._square_norms is None:
            self._square_norms = self.factored.square_norms()
        return self._square_norms

    @property
    def norms(self) -> Tensor:
        """|∇_i|: (B,) float64."""
        squares = self.square_norms
        return torch.stack(squares).sum(0).sqrt() if squares else torch.zeros_like(self.factored.losses).double()

    @property
    def total(self) -> Tree:
        """Σ_i ∇_i: a tree like `params`."""
        if self._total is None:
            self._total = self.factored.weighted_sum(torch.ones_like(self.factored.losses))
        return self._total


def fold(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Tensor,
    of: Callable[[Gradients], S],
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
    world: World = SINGLE_PROCESS,
) -> S:
    """A statistic of the sample gradients of all examples.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        params: a pytree of float tensors.
        batch: tensors (N, …), such as a whole data set.
        of: the statistic, a function of `Gradients` such as `Norms.of` or `partial(Alignment.of, direction=…)`. It
            returns `Sums`, or a tuple or dict of them for several statistics in one pass.
        mask: (N,) bool; an example with False, whatever it holds, is left out.
        chunk_size: examples taken at a time, at least 1; by default all. Memory is that of one chunk.
        plan: how `per_sample` computes each parameter; by default the cheapest way.
        world: the processes, all with the same examples, which divide the chunks between them and merge their sums.

    Returns:
        What `of` returns, over all examples, the same on all processes.

    Raises:
        TypeError: `of` is a class, a tuple or lacks an argument, or returns something else; the parameters are a
            module or not float tensors; the batch or its mask is no tensor.
        ValueError: the batch, the mask, the chunk size, the loss or the plan does not fit.

    Guarantees: equal, up to rounding, for every chunk size, order of the examples and number of processes; with
        `world.shards` bit for bit for every number of processes. Chunks are summed in the precision of the gradients,
        float32 at least, and added up in float64. Of no example, means are NaN and sums 0.

    Cost: one backward pass.

    Example:
        >>> from functorch_mnist.statistics import Moments
        >>> found = fold(lambda w, x: w * x, torch.tensor(0.0), torch.tensor([1.0, 3.0]), of=Moments.of, chunk_size=1)
        >>> found.mean, found.variance
        (tensor(2., dtype=torch.float64), tensor(2., dtype=torch.float64))
    """
    _check_of(of)
    check_params("statistics.fold", params)
    found = []
    for rows, size in _parts(world, batch, mask, chunk_size):
        some, keep = tuple([x[rows] for x in batch]), None if mask is None else mask[rows]
        parts = (of(part) for part in gradients("fold", loss_fn, params, some, keep, size, plan))
        first = next(parts)
        _check_statistic(first)
        found.append(reduce(merge, parts, first))
    mine = pairwise_sum(found, merge)
    if world.size == 1:
        return mine
    everyone: S = all_gather(world, tree.map(lambda leaf: leaf[None], mine))
    return pairwise_sum([tree.map(lambda leaf, rank=rank: leaf[rank], everyone) for rank in range(world.size)], merge)


def _check_of(of: object) -> None:
    """Refuses what is no function of `Gradients`."""
    if isinstance(of, type) and issubclass(of, Sums):
        raise TypeError(
            f"fold: of must be a function of Gradients. Found the class {of.__name__}. Pass {of.__name__}.of?"
        )
    if isinstance(of, (tuple, list, dict)):
        raise TypeError(
            f"fold: of must be one function of Gradients. Found {shown(of)}. "
            "For several statistics in one pass let it return them: lambda g: (Norms.of(g), Moments.of(g))."
        )
    check_fn("fold", "of", of, "Pass Norms.of, Moments.of, …")
    check_takes(
        "fold", "of", of, ["gradients"],  # type: ignore[arg-type]
        "Name what else it needs: partial(Alignment.of, direction=…), partial(Eigenvalues.of, bases=…).",
    )  # fmt: skip


def _parts(
    world: World, batch: tuple[Tensor, ...], mask: Tensor | None, chunk_size: int | None
) -> list[tuple[slice, int | None]]:
    """The rows of each of this process's parts, and how many are taken at a time."""
    total = batches.check("statistics.fold", batch, mask)
    if world.parts == 1:
        return [(slice(0, total), chunk_size)]
    batches.size_of_chunks("statistics.fold", batch, mask, chunk_size)
    size = max(1, chunk_size or -(-total // world.parts))
    every = split_rows(total, world.parts, unit=size)
    return [(rows, size) for rows in every[world.rank * world.parts_here : (world.rank + 1) * world.parts_here]]


def gradients(
    where: str,
    loss_fn: Callable[..., Tensor],
    params: Tree,
    batch: tuple[Tensor, ...],
    mask: Tensor | None,
    chunk_size: int | None,
    plan: Plan | None,
) -> Iterator[Gradients]:
    """The gradients of the examples, chunk by chunk."""
    check_params(f"statistics.{where}", params)
    params = tree.map(torch.Tensor.detach, params)  # else every chunk's graph would stay alive
    for chunk in batches.chunks(f"statistics.{where}", batch, mask, chunk_size):
        part = factored(loss_fn, params, *chunk.batch, mask=chunk.mask, plan=plan)
        yield Gradients(part.wide(), chunk.keep())


def merge(a: S, b: S) -> S:
    """The statistic over the examples of two folds.

    Args:
        a, b: `Sums`, or tuples or dicts of them, of the same statistics and parameters.

    Returns:
        As they are, over the examples of both.

    Raises:
        TypeError: they are of different kinds, or no statistics.
        ValueError: they hold different statistics, or are of different parameters.

    Guarantees: associative and commutative, up to the rounding of float64; the fold of no example is neutral.

    Example:
        >>> from functorch_mnist.statistics import Moments
        >>> def moments(x):
        ...     return fold(lambda w, x: w * x, torch.tensor(0.0), torch.tensor(x), of=Moments.of)
        >>> merge(moments([1.0]), moments([3.0])).mean
        tensor(2., dtype=torch.float64)
    """
    first: Any = a
    second: Any = b
    if type(first) is not type(second):
        raise TypeError(f"merge: two of one kind. Found {type(first).__name__} and {type(second).__name__}.")
    if isinstance(first, Sums):
        return first.merge(second)  # type: ignore[return-value]
    if isinstance(first, dict) and first.keys() == second.keys():
        return {name: merge(first[name], second[name]) for name in first}  # type: ignore[return-value]
    if isinstance(first, tuple) and len(first) == len(second):
        parts = [merge(x, y) for x, y in zip(first, second, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)  # type: ignore[return-value]
    if isinstance(first, (dict, tuple)):
        raise ValueError(f"merge: two with the same statistics in them. Found {_names(first)} and {_names(second)}.")
    raise TypeError(f"merge: statistics must be Sums, or tuples or dicts of them. Found {type(first).__name__}.")


def _names(statistics: Any) -> Any:
    return list(statistics) if isinstance(statistics, dict) else len(statistics)


def _check_statistic(found: Any) -> None:
    """Refuses what cannot be merged, also where there is one chunk and nothing to merge."""
    parts = list(found.values()) if isinstance(found, dict) else found if isinstance(found, tuple) else []
    if not isinstance(found, (Sums, dict, tuple)):
        raise TypeError(f"fold: statistics must be Sums, or tuples or dicts of them. Found {type(found).__name__}.")
    for part in parts:
        _check_statistic(part)


def wide_sums(values: Tree) -> Tree:
    """The tree in float64, as sums are kept."""
    return tree.map(lambda leaf: leaf.double(), values)
