"""Collectives: sums over processes.

    all_reduce     Σ_r tree_r             one all-reduce of a flat vector; every process gets the same bits
    reduce_scatter a slice of Σ_r v_r     each process gets its own slice: an all-to-all, then P slices added
    all_gather     the slices, or rows, of all processes, in the order of their ranks

With `world.shards` a sum is `all_gather` after `reduce_scatter`, whose additions are a fixed binary tree. Two processes
exchange everything, in one message instead of two. In each case a process sends 2 (P - 1) / P times the vector, the
optimum (Patarasu and Yuan 2009).

Call them outside transforms: inside `grad` a collective fails, inside `vmap` it is called once per example.

Reference: Patarasu, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69, 2009.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .. import tree
from .world import World

T = TypeVar("T")

_SENT = (torch.float32, torch.float64, torch.int64, torch.uint8)
"""Types that are sent as they are; others are sent as bytes."""


def all_reduce(world: World, values: T) -> T:
    """The sum of a tree over all processes, the same bits on each.

    Args:
        world: the processes.
        values: a pytree of tensors, of the same structure, shapes and types on all processes.

    Returns:
        The sums, in the types of the leaves. Floats are added in float32 or wider, integers exactly. In a world of one
        process it is `values` itself.

    Raises:
        TypeError: a leaf is complex or bool.
        RuntimeError: from torch, where another process is gone or late.

    Guarantees: with `world.shards` the additions are a binary tree over the ranks, whatever the shapes.

    Cost: one message for each of float32, float64 and int64 that is among the leaves; for gradients one, of a flat
        float32 vector.

    Example:
        >>> all_reduce(World(), {"w": torch.ones(2)})
        {'w': tensor([1., 1.])}

    Reference: Patarasu, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69, 2009.
    """
    if world.size == 1:
        return values
    leaves = tree.leaves(values)
    found: list[Tensor] = list(leaves)
    for kind in (torch.float32, torch.float64, torch.int64):
        which = [place for place, leaf in enumerate(leaves) if _kind(leaf) == kind]
        if not which:
            continue
        total = _summed(world, torch.cat([leaves[place].reshape(-1).to(kind) for place in which]))
        pieces = total.split([leaves[place].numel() for place in which])
        for place, piece in zip(which, pieces, strict=True):
            found[place] = piece.view(leaves[place].shape).to(leaves[place].dtype)
    return tree.unflatten(values, found)


def _kind(leaf: Tensor) -> torch.dtype:
    """The type in which a leaf is added."""
    if leaf.is_complex() or leaf.dtype == torch.bool:
        raise TypeError(f"all_reduce: leaves must be floats or integers. Found {leaf.dtype}.")
    return torch.promote_types(leaf.dtype, torch.float32) if leaf.is_floating_point() else torch.int64


def _summed(world: World, vector: Tensor) -> Tensor:
    if world.size == 2:
        return vector + _of_the_other(world, vector)
    if world.shards is None:
        return _waited(torch.ops._c10d_functional.all_reduce(vector, "sum", world.group))
    length = len(vector)
    missing = -length % world.size
    padded = torch.cat([vector, vector.new_zeros(missing)]) if missing else vector
    return all_gather(world, reduce_scatter(world, padded))[:length]


def reduce_scatter(world: World, vector: Tensor) -> Tensor:
    """This process's slice of the sum of a vector over all processes.

    Args:
        world: the processes.
        vector: (n,), n divisible by the number of processes.

    Returns:
        (n / size,): the slice of this rank.

    Raises:
        RuntimeError: from torch, where another process is gone or late.

    Guarantees: the additions are a binary tree over the ranks.

    Cost: an all-to-all: (P - 1) / P times the vector is sent.
    """
    if world.size == 1:
        return vector
    sizes = [len(vector) // world.size] * world.size
    if world.size == 2:
        halves = vector.split(sizes)
        both: Tensor = halves[world.rank] + _of_the_other(world, halves[1 - world.rank])
        return both
    parts = _waited(torch.ops._c10d_functional.all_to_all_single(vector.contiguous(), sizes, sizes, world.group))
    total: Tensor = pairwise_sum(list(parts.split(sizes)), torch.add)
    return total


def all_gather(world: World, values: T, sizes: Sequence[int] | None = None) -> T:
    """The rows of all processes, concatenated in the order of the ranks.

    Args:
        world: the processes.
        values: a pytree of tensors (n_r, …), of the same structure, types and trailing shapes on all processes.
        sizes: n_r of each process r; by default equal on all.

    Returns:
        A tree of tensors (Σ_r n_r, …), the same on all processes, bit for bit the rows that were given.

    Raises:
        RuntimeError: from torch, where another process is gone or late.

    Cost: the result is sent once to each process.

    Example:
        >>> all_gather(World(), torch.arange(3))
        tensor([0, 1, 2])
    """
    leaves = tree.leaves(values)
    if world.size == 1 or not leaves:
        return values
    mine = len(leaves[0])
    most = mine if sizes is None else max(sizes)
    alike = len({leaf.dtype for leaf in leaves}) == 1 and leaves[0].dtype in _SENT
    rows = [_rows(leaf, most, as_bytes=not alike) for leaf in leaves]
    widths = [row.shape[1] for row in rows]
    row = torch.cat(rows, 1) if len(rows) > 1 else rows[0]
    found = _gathered(world, row.contiguous())
    if sizes is not None and any(size != most for size in sizes):
        found = torch.cat([part[:size] for part, size in zip(found.split(most), sizes, strict=True)])
    columns = found.split(widths, 1)
    made = [_values(column, leaf) for column, leaf in zip(columns, leaves, strict=True)]
    return tree.unflatten(values, made)


def _gathered(world: World, row: Tensor) -> Tensor:
    """Rows of equal numbers of all processes."""
    if world.size == 2:
        theirs = _of_the_other(world, row)
        return torch.cat([row, theirs] if world.rank == 0 else [theirs, row])
    return _waited(torch.ops._c10d_functional.all_gather_into_tensor(row, world.size, world.group))


def _of_the_other(world: World, rows: Tensor) -> Tensor:
    """The other one's rows, of two processes: one message each way instead of two."""
    sizes = [0, len(rows)] if world.rank == 0 else [len(rows), 0]
    return _waited(torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), sizes, sizes, world.group))


def _rows(leaf: Tensor, rows: int, *, as_bytes: bool) -> Tensor:
    """The rows of a tensor (rows, …), padded with zeros, as bytes where types differ."""
    flat = leaf.detach().reshape(len(leaf), math.prod(leaf.shape[1:]))
    if len(leaf) < rows:
        flat = torch.cat([flat, flat.new_zeros((rows - len(leaf), flat.shape[1]))])
    return flat.contiguous().view(torch.uint8) if as_bytes else flat


def _values(column: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`: (n, …) of the type and trailing shape of a tensor."""
    flat = column if column.dtype == like.dtype else column.reshape(-1).clone().view(like.dtype)  # aligned
    found: Tensor = flat.reshape(len(column), *like.shape[1:])
    return found


def broadcast(world: World, values: T) -> T:
    """The tree of process 0, on all processes.

    Args:
        world: the processes.
        values: a pytree of tensors. Those of other processes give its structure, shapes and types.

    Returns:
        The tree of process 0, bit for bit.

    Raises:
        RuntimeError: from torch, where another process is gone or late.
    """
    leaves = tree.leaves(values)
    if world.size == 1 or not leaves:
        return values
    sent = torch.cat([leaf.detach().contiguous().reshape(-1).view(torch.uint8) for leaf in leaves])
    found = _waited(torch.ops._c10d_functional.broadcast(sent, 0, world.group))
    pieces = found.split([leaf.numel() * leaf.element_size() for leaf in leaves])
    made = [piece.clone().view(leaf.dtype).view(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
    return tree.unflatten(values, made)


def pairwise_sum(values: Sequence[T], add: Callable[[T, T], T]) -> T:
    """The sum of some values in a fixed binary tree: neighbours first, then neighbouring sums.

    Example:
        >>> pairwise_sum(["a", "b", "c", "d"], lambda x, y: f"({x} {y})")
        '((a b) (c d))'
    """
    rest = list(values)
    while len(rest) > 1:
        pairs = [add(rest[place], rest[place + 1]) for place in range(0, len(rest) - 1, 2)]
        rest = pairs + rest[len(pairs) * 2 :]
    return rest[0]


def _waited(pending: Tensor) -> Tensor:
    found: Tensor = torch.ops._c10d_functional.wait_tensor(pending)
    return found


WAITING = _waited.__name__
"""Where a process waits for the others."""
