"""Factored sample gradients of all parameters, and the algebra on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import tree
from ..batch import masked
from ..tree import Tree
from . import together
from .eigen import Eigenbasis
from .groups import groups
from .squares import CAREFUL, Careful, Plain, are_right, may_be_plain, plain_total
from .terms import Kronecker, Term


@tree.register
@dataclass(frozen=True)
class Factored:
    """The gradients of B examples, factored where that is possible: a pytree of tensors.

    Every method is exact: what it returns is what the dense gradients would give, up to rounding.
    """

    losses: Tensor
    """(B,)."""
    terms: tuple[Term, ...]
    """Of each parameter, in the order of `tree.leaves`."""
    params: Tree
    """The parameters at which they were taken."""
    aux: Tree = ()
    """What the loss returned with it, of each example: tensors (B, …)."""
    biases: tuple[int | None, ...] = field(default=(), metadata={"static": True})
    """Of each parameter, the number of the bias that its one op adds, if there is one that no other op has."""

    def masked(self, keep: Tensor) -> Factored:
        """Exactly zero, losses and aux too, where `keep` (B,) bool is False, NaN or not."""
        aux = tree.map(lambda rows: masked(rows, keep), self.aux)
        terms = tuple([term.masked(keep) for term in self.terms])
        return replace(self, losses=masked(self.losses, keep), terms=terms, aux=aux)

    def built(self) -> Factored:
        """The same, with gradients that inner products build anyway built once, where they are small."""
        return replace(self, terms=tuple([term.built() for term in self.terms]))

    def wide(self) -> Factored:
        """The same in float32 or wider, so that sums are not rounded to fewer digits."""
        return tree.map(lambda x: tree.wide(x) if x.is_floating_point() else x, self)

    def grads(self) -> Tree:
        """The dense gradients: a tree with leaves (B, *w)."""
        return self._like_params([term.grads() for term in self.terms])

    def square_norms(self, group: Tensor | None = None) -> list[Tensor]:
        """The squared norm of each parameter's part of ∇_i: (B,) in float64, in the order of `tree.leaves`.

        Args:
            group: (B,) integers, whose each example is: row i is then of `G = Σ_{j: group_j = group_i} ∇_j`. So it is
                in all that follow.

        Guarantees: right though float32 may not hold the squares, for gradients with numbers from 5e-35.
        """
        if group is not None:
            of = groups(group)
            return [together.square_norms(term, of) for term in self.terms]
        return list(self._taken(_square_norms).unbind()) if self.terms else []

    def norms(self, group: Tensor | None = None) -> Tensor:
        """|∇_i|: (B,), float32 or wider; see `square_norms`."""
        if not self.terms:
            return torch.zeros_like(self.losses)
        dtype = functools.reduce(torch.promote_types, [_dtype(term) for term in self.terms])
        squares = self._taken(_square_norms) if group is None else torch.stack(self.square_norms(group))
        return _root(squares.sum(0)).to(dtype)

    def leaf_norms(self, group: Tensor | None = None) -> Tree:
        """The norm of each parameter's part of ∇_i: a tree with leaves (B,)."""
        return self._roots(self.square_norms(group))

    def leaf_bounds(self, group: Tensor | None = None) -> Tree:
        """`leaf_norms`, slightly larger where rounding could make them smaller than what `weighted_sum` adds.

        Positions may cancel, and so may the examples of a group; what is left then depends on the order of the sums.
        """
        if group is not None:
            of = groups(group)
            squares = [(term, together.square_norms(term, of)) for term in self.terms]
            return self._roots([_with_rounding(term, x, together.reach(term, of)) for term, x in squares])
        return self._roots(list(self._taken(_bounded).unbind()) if self.terms else [])

    def _taken(self, of: Callable[[Term, Careful], Tensor]) -> Tensor:
        """What comes of the squares of each term's numbers, plain ones where they can be looked at: (L, B) float64."""
        if not may_be_plain(self.losses) or torch.float64 in [_dtype(term) for term in self.terms]:
            return torch.stack([of(term, CAREFUL) for term in self.terms])
        ways = [Plain() for _ in self.terms]
        found = plain_total([of(term, by) for term, by in zip(self.terms, ways, strict=True)])
        right = are_right(ways)
        if all(right):
            return found
        rows = zip(self.terms, found, right, strict=True)
        return torch.stack([row if good else of(term, CAREFUL) for term, row, good in rows])

    def _roots(self, squares: list[Tensor]) -> Tree:
        roots = [_root(x).to(_dtype(term)) for term, x in zip(self.terms, squares, strict=True)]
        return tree.unflatten(self.params, roots)

    def weighted_sum(self, weights: Tensor | Tree) -> Tree:
        """Σ_i c_i ∇_i, a tree like `params`, for weights c (B,), or a tree of them like `params`."""
        alone = isinstance(weights, Tensor)
        columns = [weights] * len(self.terms) if alone else tree.leaves(tree.map(lambda _, c: c, self.params, weights))
        return self._like_params([term.weighted_sum(c) for term, c in zip(self.terms, columns, strict=True)])

    def dot(self, direction: Tree) -> Tensor:
        """⟨∇_i, v⟩, for a tree v like `params`: (B,).

        Raises:
            ValueError: v has another structure or other shapes.
        """
        direction = tree.map(lambda _, v: v, self.params, direction)  # refuses another structure
        shapes, found = ([tuple(leaf.shape) for leaf in tree.leaves(t)] for t in (self.params, direction))
        if shapes != found:
            raise ValueError(f"dot: direction must have the shapes of params, {shapes}. Found {found}.")
        parts = [term.dot(v) for term, v in zip(self.terms, tree.leaves(direction), strict=True)]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(self.losses)

    def gram(self, other: Factored) -> Tensor:
        """⟨∇_i, ∇'_j⟩: (B, B'), with the gradients of other examples at the same parameters."""
        parts = [mine.gram(theirs) for mine, theirs in zip(self.terms, other.terms, strict=True)]
        return torch.stack(parts).sum(0) if parts else self.losses[:, None] * other.losses * 0

    def second_moment(self, group: Tensor | None = None) -> Tree:
        """Σ_i ∇_i², elementwise: a tree like `params`, float32 or wider; with `group` the sum of G² over the groups."""
        if group is None:
            return tree.unflatten(self.params, [term.second_moment() for term in self.terms])
        of = groups(group)
        return tree.unflatten(self.params, [together.second_moment(term, of) for term in self.terms])

    def kronecker(self, keep: Tensor | None = None) -> dict[str, Kronecker]:
        """The Kronecker factors of each parameter that has them, by its path.

        Args:
            keep: (B,) bool: which examples count; by default all.
        """
        paths, factors = tree.paths(self.params), {}
        ones = torch.ones_like(self.losses) if keep is None else keep
        for path, term, bias in zip(paths, self.terms, self._biases(), strict=True):
            pair = term.kronecker(None if bias is None else ones)
            if pair is not None:
                factors[path] = pair if bias is None else replace(pair, bias=paths[bias])
        return factors

    def eigenvalues(self, bases: Mapping[str, Eigenbasis]) -> dict[str, Tensor]:
        """`Σ_i (Uᵀ ∇_i V)²`, elementwise, by the path of each parameter that has a basis; of the others `Σ_i ∇_i²`.

        A bias that its weight's basis includes is not among them.
        """
        terms = dict(zip(tree.paths(self.params), self.terms, strict=True))
        within = {basis.bias for basis in bases.values()}
        found = {}
        for path, term in terms.items():
            if path in bases:
                bias = bases[path].bias
                found[path] = bases[path].second_moment(term, None if bias is None else terms[bias])
            elif path not in within:
                found[path] = term.second_moment()
        return found

    def project(self, maps: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """`L ∇_i Rᵀ` of each parameter, read as a matrix from its last axes to its first.

        Args:
            maps: `(L (h, H), R (d, D))` of each parameter, in the order of `tree.leaves`. H is its first size, 1 for
                a 0-d one, and D the number of all numbers of a row.

        Returns:
            For each parameter (B, h, d).

        Raises:
            ValueError: there are not as many maps, or their shapes do not fit.
        """
        return [term.project(left, right) for term, (left, right) in self._mapped(maps)]

    def pairs(self, maps: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor] | None]:
        """`L g_i` (B, h) and `R a_i` (B, d) of each parameter whose gradients are outer products, else none.

        `project` is then their outer product, h d numbers for the h + d of both.

        Args:
            maps: as in `project`.
        """
        return [term.pair(left, right) for term, (left, right) in self._mapped(maps)]

    def sides(self, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        """`Σ_i c_i² ∇_i ∇_iᵀ` (H, H) and `Σ_i c_i² ∇_iᵀ ∇_i` (D, D) of each parameter as a matrix, see `project`."""
        return [term.sides(weights) for term in self.terms]

    def _mapped(self, maps: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Term, tuple[Tensor, Tensor]]]:
        """The terms with their maps, checked, in the precision of their numbers."""
        leaves = tree.leaves(self.params)
        shapes = [(leaf.shape[0] if leaf.dim() else 1, leaf.numel()) for leaf in leaves]
        found = [(left.shape[-1], left.shape[-1] * right.shape[-1]) for left, right in maps]
        if found != shapes:
            raise ValueError(f"project: a map's sizes must be those of its parameter, {shapes}. Found {found}.")
        for term, leaf, (left, right) in zip(self.terms, leaves, maps, strict=True):
            dtype = tree.wide(leaf).dtype
            yield term, (left.to(dtype), right.to(dtype))

    def _biases(self) -> tuple[int | None, ...]:
        return self.biases or (None,) * len(self.terms)

    def _like_params(self, values: list[Tensor]) -> Tree:
        leaves = tree.leaves(self.params)
        return tree.unflatten(self.params, [v.to(leaf.dtype) for v, leaf in zip(values, leaves, strict=True)])


_ROUNDING = 16
"""Units in the last place by which sums over positions were seen to differ, with a margin."""


def _dtype(term: Term) -> torch.dtype:
    """Of norms: that of the factors, float32 or wider."""
    return functools.reduce(
        torch.promote_types, [x.dtype for x in term.factors() if x.is_floating_point()], torch.float32
    )


def _square_norms(term: Term, by: Careful) -> Tensor:
    return term.square_norms(by)


def _bounded(term: Term, by: Careful) -> Tensor:
    """The squared norms, and what rounding may have hidden of them."""
    squares, reach = term.square_norms(by), term.reach(by)
    return squares if reach is None else _with_rounding(term, squares, reach)


def _with_rounding(term: Term, squares: Tensor, reach: Tensor) -> Tensor:
    return squares.clamp(min=0) + _ROUNDING * torch.finfo(_dtype(term)).eps * reach.square()


def _root(squares: Tensor) -> Tensor:
    """The square root, whose gradient at zero is that of a norm: zero."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), squares)
