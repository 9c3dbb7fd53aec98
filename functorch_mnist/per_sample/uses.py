"""Several uses of one parameter: as one term where they are of one kind, else as a sum.

With ∇_i = x_i + y_i from two uses,

    ⟨∇_i, ∇_j⟩ = ⟨x_i, x_j⟩ + ⟨y_i, y_j⟩ + ⟨x_i, y_j⟩ + ⟨y_i, x_j⟩

For a table that is embedding and output layer the last two are lookups in the cotangents of the logits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import tree
from .groups import Members
from .layout import of_rows
from .lookups import Lookup
from .squares import CAREFUL, Careful
from .terms import Outer, Strategy, Term, Viewed


@tree.register
@dataclass(frozen=True)
class Sum(Term):
    """Several uses of one parameter: linear results are added up, inner products taken pair by pair or built."""

    terms: tuple[Term, ...]
    strategy: Strategy = tree.static()

    def factors(self) -> tuple[Tensor, ...]:
        return tuple([x for term in self.terms for x in term.factors()])

    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape()

    def examples(self, rows: slice | Tensor) -> Sum:
        return replace(self, terms=tuple([term.examples(rows) for term in self.terms]))

    def of_groups(self, members: Members) -> Iterator[tuple[Tensor, Term]]:
        every = [] if self.strategy == "build" else [list(term.of_groups(members)) for term in self.terms]
        if len({tuple([len(groups) for groups, _ in parts]) for parts in every}) != 1:
            yield from super().of_groups(members)
            return
        for several in zip(*every, strict=True):
            yield several[0][0], replace(self, terms=tuple([term for _, term in several]))

    def grads(self) -> Tensor:
        return _total([term.grads() for term in self.terms])

    def masked(self, keep: Tensor) -> Sum:
        return replace(self, terms=tuple([term.masked(keep) for term in self.terms]))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return _total([term.weighted_sum(weights) for term in self.terms])

    def dot(self, direction: Tensor) -> Tensor:
        return _total([term.dot(direction) for term in self.terms])

    def square_norms(self, by: Careful = CAREFUL) -> Tensor:
        if self.strategy == "build":
            return super().square_norms(by)
        own = [term.square_norms(by) for term in self.terms]
        ready = [by.ready(term, squares) for term, squares in zip(self.terms, own, strict=True)]
        crossed = [
            by.crossed(y.inner(x) if isinstance(y, Lookup) else x.inner(y), c * d)
            for (x, c), (y, d) in itertools.combinations(ready, 2)
        ]
        return _total(own + crossed).clamp(min=0)  # uses may cancel

    def reach(self, by: Careful = CAREFUL) -> Tensor | None:
        reaches = [term.reach(by) for term in self.terms]
        norms = [term.square_norms(by).sqrt() if r is None else r for term, r in zip(self.terms, reaches, strict=True)]
        return _total(norms)

    def gram(self, other: Term) -> Tensor:
        if self.strategy == "build" or not isinstance(other, Sum):
            return super().gram(other)
        return _total([_gram(x, y) for x in self.terms for y in other.terms])

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        return _total([term.project(left, right) for term in self.terms])


def _gram(x: Term, y: Term) -> Tensor:
    return y.gram(x).T if isinstance(y, Lookup) else x.gram(y)


def _total(values: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)


def merge(terms: list[Term], strategy: Strategy) -> Term:
    """One term for all uses of a parameter: linear maps and lookups become one each, at the positions of all."""
    if len(terms) == 1:
        return terms[0]
    plain = [_of_rows(term) for term in terms]
    merged: list[Term] = []
    for term in plain:
        for i, other in enumerate(merged):
            joint = _joint(other, term)
            if joint is not None:
                merged[i] = joint
                break
        else:
            merged.append(term)
    if strategy == "pairs":
        merged = [term.settled() for term in merged]
    return merged[0] if len(merged) == 1 else Sum(tuple(merged), strategy)


def _joint(one: Term, other: Term) -> Term | None:
    """Two uses as one, if they are of one kind."""
    if isinstance(one, Outer) and isinstance(other, Outer) and one.layout == other.layout:
        return replace(one, a=torch.cat([one.a, other.a], 2), g=torch.cat([one.g, other.g], 2))
    if isinstance(one, Lookup) and isinstance(other, Lookup):
        rows, g, live = (
            torch.cat(both, 1) for both in ((one.rows, other.rows), (one.g, other.g), (one.live, other.live))
        )
        return replace(one, rows=rows, g=g, live=live)
    if isinstance(one, Viewed) and isinstance(other, Viewed) and one.view == other.view:
        joint = _joint(one.term, other.term)
        return None if joint is None else Viewed(joint, one.view)
    return None


def _of_rows(term: Term) -> Term:
    """A linear map of a matrix, whichever way it reads it, as one from its columns to its rows."""
    inner, views = (term.term, (term.view,)) if isinstance(term, Viewed) else (term, ())
    read = of_rows(inner.layout, views) if isinstance(inner, Outer) else None
    if read is None or not isinstance(inner, Outer):
        return term
    a, g = (inner.g, inner.a) if read[1] else (inner.a, inner.g)
    return Outer(a, g, read[0], inner.strategy)
