"""Sums and rows over the chunks of a batch.

Eager mode takes chunk after chunk. The compiler is given a loop, of which it compiles one step, so that compiling takes
as long for many chunks as for one; a loop of Python it would write out. Tensors may not leave a step but as its result:
the survey is made before. A transform of torch.func cannot go through the loop: inside one, it is written out.

With groups, a chunk takes whole groups, so rows are taken in another order than they came in, and rows of results are
put back into theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import batch as batches
from .. import native, tree
from ..batch import Chunk, masked
from ..compiler import loop
from ..tree import Tree
from .capture import LossFn
from .groups import packed
from .planning import Plan
from .prepared import passes

Run: TypeAlias = Callable[..., Any]
"""`run(finish, *more)`: what `finish` makes of the factored gradients of a chunk."""


@dataclass(frozen=True)
class Chunked:
    """The gradients of a batch, chunk after chunk."""

    where: str
    """The quantity that errors name."""
    loss_fn: LossFn
    params: Tree
    batch: Sequence[Tensor]
    mask: Tensor | None
    chunk_size: int | None
    plan: Plan | None
    first: Tensor | None = None
    """(B,): where groups are to stay whole, the first row of each row's group."""

    @property
    def size(self) -> int:
        """Rows in a chunk."""
        return batches.size_of_chunks(self._name, self.batch, self.mask, self.chunk_size)

    @property
    def alone(self) -> bool:
        """Whether one chunk is the whole batch, without padding."""
        return self.size == len(self.batch[0])

    def runs(self) -> Iterator[tuple[Chunk, Run]]:
        """Each chunk, and its pass."""
        run = passes(self.loss_fn, self.params, self.plan)
        for chunk in batches.chunks(self._name, self.batch, self.mask, self.chunk_size):
            yield chunk, partial(run, chunk.batch, chunk.mask)

    def rows(self, of: Callable[..., list[Tensor]], *columns: Tensor) -> list[Tensor]:
        """What `of(run, *columns)` has of each example, (B, …), see `both`."""
        _, rows = self.both(lambda run, *columns: ((), of(run, *columns)), *columns, like=())
        return rows

    def sums(self, of: Callable[..., Tree], *columns: Tensor, like: Tree | None = None) -> Tree:
        """The sums of `of(run, *columns)` over all chunks, see `both`."""
        sums, _ = self.both(lambda run, *columns: (of(run, *columns), []), *columns, like=like)
        return sums

    def both(
        self, of: Callable[..., tuple[Tree, list[Tensor]]], *columns: Tensor, like: Tree | None = None
    ) -> tuple[Tree, list[Tensor]]:
        """Sums over all chunks, and what there is of each example, (B, …).

        Args:
            of: `of(run, *columns)`, the two of one chunk.
            columns: (B, …) each, given to `of` chunk by chunk with zeros in the padding.
            like: a tree with the shapes, dtypes and strides of the sums; without it, the compiler goes through the
                loss once more to find them.
        """
        if self.first is not None and self.size < len(self.batch[0]):
            return self._by_groups(of, columns, self.first)
        if torch.compiler.is_dynamo_compiling() and self.size < len(self.batch[0]) and native.level() == 0:
            return self._looped(of, columns, like)
        return _added_up(of, self.runs(), columns)

    def _by_groups(
        self, of: Callable[..., tuple[Tree, list[Tensor]]], columns: Sequence[Tensor], first: Tensor
    ) -> tuple[Tree, list[Tensor]]:
        """The same with whole groups in each chunk."""
        order, parts = packed(self.where, first, self.size)
        run = passes(self.loss_fn, self.params, self.plan)

        def runs() -> Iterator[tuple[Chunk, Run]]:
            for rows in parts:
                at = order[rows]
                keep = None if self.mask is None else self.mask[at]
                chunk = batches.padded([x[at] for x in self.batch], keep, rows, self.size)
                yield chunk, partial(run, chunk.batch, chunk.mask)

        sums, found = _added_up(of, runs(), [column[order] for column in columns])
        return sums, [x[order.argsort()] for x in found]

    def _looped(
        self, of: Callable[..., tuple[Tree, list[Tensor]]], columns: Sequence[Tensor], like: Tree | None
    ) -> tuple[Tree, list[Tensor]]:
        """The same by a loop of the compiler's."""
        total, count = len(self.batch[0]), -(-len(self.batch[0]) // self.size)
        padded = count * self.size > total
        run = passes(self.loss_fn, self.params, self.plan)
        run.look(self.batch, self.mask)

        def taken(numbers: Tensor) -> tuple[Tree, list[Tensor]]:
            real = numbers < total if padded else None
            at = numbers.clamp(max=total - 1) if padded else numbers  # a chunk is copied, never the batch
            keep = None if self.mask is None else self.mask[at]
            if real is not None:
                keep = real if keep is None else keep & real
            one = partial(run, [x[at] for x in self.batch], keep)
            return of(one, *[column[at] if real is None else masked(column[at], real) for column in columns])

        def step(sums: list[Tensor], numbers: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            more, rows = taken(numbers)
            sums = [_added(x, y) for x, y in zip(sums, tree.leaves(more), strict=True)]
            return sums, [x.clone() for x in rows]  # nothing that is returned may be a view of something else

        numbers = torch.arange(count * self.size, device=self.batch[0].device).view(count, self.size)
        like = taken(numbers[0])[0] if like is None else like
        sums, rows = loop(step, [torch.zeros_like(x) for x in tree.leaves(like)], numbers)
        return tree.unflatten(like, sums), [x.flatten(0, 1)[:total] for x in rows]

    @property
    def _name(self) -> str:
        return f"per_sample.{self.where}"


def _added_up(
    of: Callable[..., tuple[Tree, list[Tensor]]], runs: Iterator[tuple[Chunk, Run]], columns: Sequence[Tensor]
) -> tuple[Tree, list[Tensor]]:
    """Sums over chunks and their rows, one after another."""
    sums: Tree = None
    parts = []
    for chunk, run in runs:
        more, rows = of(run, *[chunk.padded(column) for column in columns])
        sums = more if sums is None else tree.map(torch.add, sums, more)
        parts.append([chunk.unpadded(x) for x in rows])
    return sums, [torch.cat(column) for column in zip(*parts, strict=True)]


def _added(total: Tensor, part: Tensor) -> Tensor:
    """Their sum, with the strides of the first."""
    result = total + part
    return result if result.stride() == total.stride() else torch.empty_like(total).copy_(result)
