"""The eigenvectors of Kronecker factors, and second moments along them.

Of a parameter whose second moment is taken as A ⊗ G, with eigenvectors V of A (D, D) and U of G (H, H), the
eigenvectors are the products u vᵀ, and along them sample gradients have the second moments

    Λ = Σ_i (Uᵀ ∇_i V)²,    elementwise, (H, D)

which correct the products of eigenvalues: of all matrices with these eigenvectors, that with Λ is the nearest to the
second moment. A basis may hold the first R eigenvectors alone; the others then have the mean of their second moments.

Reference: George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", NeurIPS 2018,
section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import random, tree
from .layout import Layout, View, as_matrices, as_parameter
from .lookups import Lookup
from .terms import Kronecker, Outer, Term, Viewed, product

_ITERATIONS = 8
"""Of subspace iteration: an eigenvalue half as large as the last one kept has faded to 2^-16 of it."""
_MARGIN = 1.125
"""So many times more vectors are iterated than are kept."""


class Split(NamedTuple):
    """Matrices by the parts of a basis: along the kept eigenvectors, and what is left on either side."""

    kept: Tensor
    """`Uᵀ m V`, (*lead, G, S, R)."""
    outputs: Tensor | None
    """`m V - U Uᵀ m V`, (*lead, G, H, R); none where all of U is kept."""
    inputs: Tensor | None
    """`Uᵀ m - Uᵀ m V Vᵀ`, (*lead, G, S, D); none where all of V is kept."""
    both: Tensor | None
    """The rest, (*lead, G, H, D)."""


@tree.register
@dataclass(frozen=True)
class Eigenbasis:
    """The eigenvectors of a parameter's Kronecker factors, its bias included where the same op adds one."""

    inputs: Tensor | tuple[()]
    """(G, D, R), columns; D counts the bias. Nothing for an embedding: its factor is diagonal."""
    outputs: Tensor
    """(G, H, S), columns."""
    layout: Layout = tree.static()
    views: tuple[View, ...] = tree.static()
    bias: str | None = tree.static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return self.views[0].before if self.views else self.layout.shape

    def products(self, factors: Kronecker) -> Tensor:
        """The eigenvalues of A ⊗ G, the products of those of its factors, arranged as `second_moment`."""
        outputs = _values(factors.cotangents, self.outputs)
        inputs = factors.inputs[None] if isinstance(self.inputs, tuple) else _values(factors.joined, self.inputs)
        return outputs[:, :, None] * inputs[:, None, :]

    def second_moment(self, term: Term, bias: Term | None) -> Tensor:
        """`Σ_i (Uᵀ ∇_i V)²`: (G, S, R), each side one longer, by the mean over what is left, where not all is kept."""
        while isinstance(term, Viewed):
            term = term.term
        if isinstance(term, Lookup):
            return self._of_rows(term)
        if isinstance(term, Outer) and term.a.shape[2] == 1 and not isinstance(self.inputs, tuple):
            a, g = tree.wide(term.a), tree.wide(term.g)
            a = a if bias is None else torch.cat([a, torch.ones_like(a[..., :1])], -1)
            return product(_squares(g, self.outputs), _squares(a, self.inputs))
        parts = term.in_parts()
        shifts = [None] * len(parts) if bias is None else bias.in_parts(len(parts[0].factors()[0]))
        sums = [
            self._of_matrices(self.matrices(part.grads(), None if shift is None else shift.grads(), views=()))
            for part, shift in zip(parts, shifts, strict=True)
        ]
        return torch.stack(sums).sum(0)

    def matrices(self, v: Tensor, bias: Tensor | None, *, views: tuple[View, ...] | None = None) -> Tensor:
        """What is shaped as the parameter and its bias, (*lead, *w), as matrices (*lead, G, H, D)."""
        m = as_matrices(v, self.layout, self.views if views is None else views)
        if bias is None:
            return m
        return torch.cat([m, bias.reshape(*m.shape[:-1], 1).to(m.dtype)], -1)

    def parameters(self, m: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The way back; the second is shaped as `bias`."""
        if bias is None:
            return as_parameter(m, self.layout, self.views), None
        return as_parameter(m[..., :-1], self.layout, self.views), m[..., -1].reshape(bias.shape)

    def split(self, m: Tensor) -> Split:
        """Matrices (*lead, G, H, D) by the parts of the basis."""
        u, v = self._vectors(m)
        along = m if isinstance(v, tuple) else m @ v
        kept = u.mT @ along
        outputs = along - u @ kept if u.shape[1] > u.shape[2] else None
        inputs = u.mT @ m - kept @ v.mT if not isinstance(v, tuple) and v.shape[1] > v.shape[2] else None
        if outputs is None or inputs is None or isinstance(v, tuple):
            return Split(kept, outputs, inputs, None)
        return Split(kept, outputs, inputs, m - u @ (kept @ v.mT + inputs) - outputs @ v.mT)

    def joined(self, parts: Split) -> Tensor:
        """The way back: (*lead, G, H, D)."""
        u, v = self._vectors(parts.kept)
        along = u @ parts.kept if parts.outputs is None else u @ parts.kept + parts.outputs
        m = along if isinstance(v, tuple) else along @ v.mT
        for rest in (None if parts.inputs is None else u @ parts.inputs, parts.both):
            m = m if rest is None else m + rest
        return m

    def _vectors(self, like: Tensor) -> tuple[Tensor, Tensor | tuple[()]]:
        """U and V in the precision of what they are multiplied with."""
        return self.outputs.to(like.dtype), self.inputs if isinstance(self.inputs, tuple) else self.inputs.to(
            like.dtype
        )

    def _of_matrices(self, m: Tensor) -> Tensor:
        """`Σ_i (Uᵀ m_i V)²` of (B, G, H, D), each side with the mean over what is left."""
        found = self.split(tree.wide(m))
        squares = found.kept.square().sum(0)
        u, v = self.outputs, self.inputs
        below = None if found.outputs is None else found.outputs.square().sum((0, 2)) / (u.shape[1] - u.shape[2])
        if found.inputs is None or isinstance(v, tuple):
            return squares if below is None else torch.cat([squares, below[:, None]], 1)
        left = v.shape[1] - v.shape[2]
        squares = torch.cat([squares, found.inputs.square().sum((0, 3))[..., None] / left], 2)
        if below is None or found.both is None:
            return squares
        corner = found.both.square().sum((0, 2, 3)) / (left * (u.shape[1] - u.shape[2]))
        return torch.cat([squares, torch.cat([below, corner[:, None]], 1)[:, None]], 1)

    def _of_rows(self, term: Lookup) -> Tensor:
        """The same of a table's rows, which are the inputs: (1, S, V)."""
        rows, sums = term.segments()
        squares = _squares(sums, self.outputs[0])
        table = squares.new_zeros(term.table[0], squares.shape[-1])
        return table.index_add(0, rows.flatten(), squares.flatten(0, 1)).T[None]


def eigenbasis(factors: Kronecker, *, rank: int | None = None) -> Eigenbasis:
    """The eigenvectors of Kronecker factors.

    Args:
        factors: of a parameter.
        rank: how many of the largest eigenvalues have theirs kept, on either side; by default all.

    Cost: D³ and H³ where all are kept, else D² and H² times the rank.
    """
    inputs = () if factors.diagonal else leading_eigenvectors(factors.joined, rank)
    return Eigenbasis(
        inputs, leading_eigenvectors(factors.cotangents, rank), factors.layout, factors.views, factors.bias
    )


def leading_eigenvectors(matrices: Tensor, rank: int | None) -> Tensor:
    """The eigenvectors of the largest eigenvalues, the largest first.

    Args:
        matrices: (G, D, D), symmetric and positive semidefinite.
        rank: R, how many; by default D.

    Returns:
        (G, D, R), columns.
    """
    size = matrices.shape[-1]
    count = size if rank is None else min(size, max(1, round(_MARGIN * rank)))
    if rank is None or 2 * count >= size:  # iterating saves nothing
        vectors: Tensor = torch.linalg.eigh(matrices).eigenvectors
        return vectors.flip(-1)[..., : size if rank is None else rank]
    start = random.normal(random.key(0, device=matrices.device), (size, count)).to(matrices)
    q: Tensor = torch.linalg.qr(matrices @ start).Q
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(matrices @ q).Q
    within: Tensor = torch.linalg.eigh(q.mT @ matrices @ q).eigenvectors.flip(-1)[..., :rank]
    return q @ within


def _values(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(G, R): `vᵀ M v` of each column, and where these are not all, the mean over what is left."""
    kept = ((matrices @ vectors) * vectors).sum(-2).clamp(min=0)
    left = vectors.shape[-2] - vectors.shape[-1]
    if not left:
        return kept
    rest = (matrices.diagonal(dim1=-2, dim2=-1).sum(-1) - kept.sum(-1)).clamp(min=0) / left
    return torch.cat([kept, rest[:, None]], -1)


def _squares(x: Tensor, vectors: Tensor) -> Tensor:
    """(…, R) squares of (…, D) along the columns (D, R), and where these are not all, the mean over what is left."""
    along = (x @ vectors.to(x.dtype)).square()
    left = vectors.shape[-2] - vectors.shape[-1]
    if not left:
        return along
    rest = (x.square().sum(-1) - along.sum(-1)).clamp(min=0) / left
    return torch.cat([along, rest[..., None]], -1)
