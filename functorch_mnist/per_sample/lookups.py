"""Sample gradients of a table of which an op takes rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import tree
from ..batch import masked
from .layout import layout
from .squares import CAREFUL, Careful, row_sums
from .terms import Kronecker, Strategy, Term, scaled

_PAIRS = 2**24
"""Inner products of positions that are held at a time, where they outgrow the factors: 64 MB in float32."""


@tree.register
@dataclass(frozen=True)
class Lookup(Term):
    """Rows of a table at T positions: `∇_i[v] = Σ_t [v = a_it] g_it`.

    Positions of one row are added up by sorting them, so that nothing is as large as T² or as the table.
    """

    rows: Tensor
    """(B, T) integers in [0, V)."""
    g: Tensor
    """(B, T, H), zero where a position does not count."""
    live: Tensor
    """(B, T) bool: which positions count."""
    table: tuple[int, ...] = tree.static()
    """(V, H)."""
    strategy: Strategy = tree.static()

    def factors(self) -> tuple[Tensor, ...]:
        return (self.g,)

    def shape(self) -> tuple[int, ...]:
        return self.table

    def grads(self) -> Tensor:
        zeros = self.g.new_zeros(len(self.g), *self.table)
        return zeros.scatter_add(1, self.rows[..., None].expand_as(self.g), self.g)

    def in_groups(self, size: int) -> Iterator[Term]:
        rows, g, live = (x.unflatten(0, (-1, size)).flatten(1, 2) for x in (self.rows, self.g, self.live))
        yield replace(self, rows=rows, g=g, live=live).settled()

    def masked(self, keep: Tensor) -> Lookup:
        return replace(self, g=masked(self.g, keep), live=masked(self.live, keep))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        g = scaled(self.g, weights).flatten(0, 1)
        return self.g.new_zeros(self.table).index_add(0, self.rows.flatten(), g)

    def dot(self, direction: Tensor) -> Tensor:
        return row_sums(F.embedding(self.rows, tree.wide(direction)) * self.g)

    def times(self, c: Tensor) -> Lookup:
        return replace(self, g=scaled(tree.wide(self.g), c))

    def square_norms(self, by: Careful = CAREFUL) -> Tensor:
        return super().square_norms(by) if self.strategy == "build" else by.squares(self.segments()[1])

    def reach(self, by: Careful = CAREFUL) -> Tensor | None:
        return by.squares(self.g, 2).sqrt().sum(1)

    def settled(self) -> Lookup:
        return replace(self, strategy="gram")

    def inner(self, other: Term) -> Tensor:
        found = other.columns(self.rows)
        if found is None:
            return super().inner(other)
        a, cotangents = found  # (B, T', H) and (B, T', T)
        return row_sums(cotangents * (a @ tree.wide(self.g).transpose(1, 2)))

    def gram(self, other: Term) -> Tensor:
        if self.strategy == "build" or not (isinstance(other, Lookup) or self._crosses(other)):
            return super().gram(other)
        factors = max([x.numel() for x in (*self.factors(), *other.factors())])
        at_once = max(1, max(factors, _PAIRS) // (self.rows.numel() * other.factors()[0].shape[-2]))
        return torch.cat([self._gram(part) for part in other.in_parts(at_once)], 1)

    def _crosses(self, other: Term) -> bool:
        return other.columns(self.rows[:1, :1].expand(len(other.factors()[0]), -1)) is not None

    def _gram(self, other: Term) -> Tensor:
        g = tree.wide(self.g).flatten(0, 1)
        if isinstance(other, Lookup):
            same = self.rows.flatten()[:, None] == other.rows.flatten()  # (B T, B' T')
            products = torch.where(same, g @ tree.wide(other.g).flatten(0, 1).T, 0.0)
            return products.view(*self.rows.shape, *other.rows.shape).sum((1, 3))
        found = other.columns(self.rows.flatten().expand(len(other.factors()[0]), -1))
        if found is None:
            return super().gram(other)
        a, cotangents = found
        products = cotangents * (a @ g.T)  # (B', T', B T)
        return products.view(*a.shape[:2], *self.rows.shape).sum((1, 3)).T

    def second_moment(self) -> Tensor:
        rows, sums = self.segments()
        return sums.new_zeros(self.table).index_add(0, rows.flatten(), sums.square().flatten(0, 1))

    def kronecker(self, ones: Tensor | None = None) -> Kronecker:  # noqa: ARG002 (no op adds a bias to rows)
        g = tree.wide(self.g).flatten(0, 1)
        counts = g.new_zeros(self.table[0]).index_add(0, self.rows.flatten(), self.live.flatten().to(g.dtype))
        return Kronecker(counts, (g.T @ g)[None], layout(self.table, outputs=(1,)), ())

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        return F.embedding(self.rows, left.T).transpose(1, 2) @ (tree.wide(self.g) @ right.T)

    def segments(self) -> tuple[Tensor, Tensor]:
        """The different rows of each example, (B, T), and the sums of g over the positions of each, (B, T, H).

        There may be fewer than T: what is left is zero.
        """
        rows, order = self.rows.sort(dim=1)
        first = torch.zeros_like(rows)
        first[:, 1:] = rows[:, 1:] != rows[:, :-1]
        segment = first.cumsum(1)
        g = tree.wide(self.g).gather(1, order[..., None].expand_as(self.g))
        sums = torch.zeros_like(g).scatter_add(1, segment[..., None].expand_as(g), g)
        return torch.zeros_like(rows).scatter(1, segment, rows), sums
