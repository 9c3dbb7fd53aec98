"""The division of rows between processes.

A batch is drawn once, the same on every process, and divided into equal parts, padded and masked: shapes are the same
on all processes, so that all compile and call the same. Each process takes adjacent parts, in the order of the ranks.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from .. import tree
from ..data import Batch
from .sums import all_gather
from .world import World

T = TypeVar("T")


def rows_of(world: World, batch: Batch) -> Batch:
    """This process's rows of a batch that all processes have drawn.

    Args:
        world: the processes.
        batch: (B,) examples, at least one, and their mask.

    Returns:
        `world.parts_here` parts of ⌈B / world.parts⌉ rows, concatenated. Rows beyond B repeat the first example and are
        masked. In a world of one process without shards it is the batch itself.

    Example:
        >>> rows_of(World(shards=2), Batch(torch.tensor([5, 6, 7]), None))
        Batch(examples=tensor([5, 6, 7, 5]), mask=tensor([ True,  True,  True, False]))
    """
    if world.parts == 1:
        return batch
    rows = len(batch.examples)
    each = -(-rows // world.parts)
    missing = each * world.parts - rows
    examples, mask = batch.examples, batch.mask
    if missing:
        mask = torch.ones_like(examples, dtype=torch.bool) if mask is None else mask
        examples = torch.cat([examples, examples[:1].expand(missing)])
        mask = torch.cat([mask, mask.new_zeros(missing)])
    mine = slice(world.rank * world.parts_here * each, (world.rank + 1) * world.parts_here * each)
    return Batch(examples[mine], None if mask is None else mask[mine])


def parts_of(world: World, batch: Batch) -> list[Batch]:
    """The parts of this process's rows, in order: what `rows_of` gives, cut into `world.parts_here`."""
    masks = [None] * world.parts_here if batch.mask is None else batch.mask.chunk(world.parts_here)
    return [Batch(*part) for part in zip(batch.examples.chunk(world.parts_here), masks, strict=True)]


def split_rows(count: int, parts: int, *, unit: int = 1) -> list[slice]:
    """A division of rows into adjacent parts, as equal as whole units can be.

    Args:
        count: the number of rows, from 0.
        parts: the number of parts, some of which may be empty.
        unit: rows that stay together, such as those of a chunk.

    Example:
        >>> split_rows(5, 2, unit=2)
        [slice(0, 2, None), slice(2, 5, None)]
    """
    units = -(-count // unit)
    edges = [min(count, units * part // parts * unit) for part in range(parts + 1)]
    return [slice(*edge) for edge in pairwise(edges)]


def map_rows(
    world: World, fn: Callable[..., T], *rows: Tensor, mask: Tensor | None = None, unit: int | None = None
) -> T:
    """A row-wise function of a data set, with the rows divided between the processes.

    Args:
        world: the processes.
        fn: `fn(*rows) -> tree of (n, …)`, its i-th row a function of the i-th row alone; with a mask
            `fn(*rows, mask=…)`.
        rows: tensors (N, …), at least one row, the same on all processes.
        mask: (N,) bool, divided as the rows are.
        unit: rows that `fn` takes at a time: then each process gets whole units, the same as a single process would
            make. By default each process gets its rows at once.

    Returns:
        `fn(*rows)`, the same on all processes.

    Cost: the result is sent once to each process.

    Example:
        >>> map_rows(World(), torch.neg, torch.arange(3))
        tensor([ 0, -1, -2])
    """
    if world.size == 1:
        return fn(*rows) if mask is None else fn(*rows, mask=mask)
    divided = split_rows(len(rows[0]), world.size, unit=unit or 1)
    sizes = [part.stop - part.start for part in divided]
    mine = divided[world.rank]
    some = mine if sizes[world.rank] else slice(0, unit or 1)  # a process without rows computes some for the shapes
    part = [x[some] for x in rows]
    values = fn(*part) if mask is None else fn(*part, mask=mask[some])
    return all_gather(world, _first(values, sizes[world.rank]), sizes)


def _first(values: T, count: int) -> T:
    return tree.map(lambda leaf: leaf[:count], values)
