"""Factored sample gradients of all parameters, and the algebra on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import batch as batches
from .. import tree
from ..batch import masked
from ..tree import Tree
from .capture import LossFn, Strayed, Survey, factor, survey
from .plan import Plan, strategies
from .terms import Kronecker, Strategy, Term


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
    """What the loss returned beside it, of each example: tensors (B, …)."""

    def masked(self, keep: Tensor) -> Factored:
        """Exactly zero, losses and aux too, where `keep` (B,) bool is False, NaN or not."""
        aux = tree.map(lambda rows: masked(rows, keep), self.aux)
        return Factored(masked(self.losses, keep), tuple([term.masked(keep) for term in self.terms]), self.params, aux)

    def built(self) -> Factored:
        """The same, with gradients that inner products build anyway built once, where they are small."""
        return Factored(self.losses, tuple([term.built() for term in self.terms]), self.params, self.aux)

    def wide(self) -> Factored:
        """The same in float32 or wider, so that sums are not rounded to fewer digits."""
        return tree.map(lambda x: tree.wide(x) if x.is_floating_point() else x, self)

    def grads(self) -> Tree:
        """The dense gradients: a tree with leaves (B, *w)."""
        return self._like_params([term.grads() for term in self.terms])

    def norms(self) -> Tensor:
        """|∇_i|: (B,)."""
        squares = [term.square_norms() for term in self.terms]
        return _root(torch.stack(squares).sum(0)) if squares else torch.zeros_like(self.losses)

    def leaf_norms(self) -> Tree:
        """The norm of each parameter's part of ∇_i: a tree with leaves (B,)."""
        return tree.unflatten(self.params, [_root(term.square_norms()) for term in self.terms])

    def leaf_bounds(self) -> Tree:
        """`leaf_norms`, a trifle larger where rounding could make them smaller than what `weighted_sum` adds.

        Positions may cancel, and what is left of a gradient then hangs on the order of its sums.
        """
        return tree.unflatten(self.params, [_root(_bounded(term)) for term in self.terms])

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

    def second_moment(self) -> Tree:
        """Σ_i ∇_i², elementwise: a tree like `params`, float32 or wider."""
        return tree.unflatten(self.params, [term.second_moment() for term in self.terms])

    def kronecker(self) -> dict[str, Kronecker]:
        """The Kronecker factors of each parameter that has them, by its path."""
        factors = {path: term.kronecker() for path, term in zip(tree.paths(self.params), self.terms, strict=True)}
        return {path: pair for path, pair in factors.items() if pair is not None}

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
        shapes = [(leaf.shape[0] if leaf.dim() else 1, leaf.numel()) for leaf in tree.leaves(self.params)]
        found = [(left.shape[-1], left.shape[-1] * right.shape[-1]) for left, right in maps]
        if found != shapes:
            raise ValueError(f"project: a map's sizes must be those of its parameter, {shapes}. Found {found}.")
        return [
            term.project(left.to(tree.wide(leaf).dtype), right.to(tree.wide(leaf).dtype))
            for term, leaf, (left, right) in zip(self.terms, tree.leaves(self.params), maps, strict=True)
        ]

    def _like_params(self, values: list[Tensor]) -> Tree:
        leaves = tree.leaves(self.params)
        return tree.unflatten(self.params, [v.to(leaf.dtype) for v, leaf in zip(values, leaves, strict=True)])


def factored(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    mask: Tensor | None = None,
    plan: Plan | None = None,
    has_aux: bool = False,
) -> Factored:
    """The factored gradients of each example of a batch, by one backward pass.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …), B at least 1.
        mask: (B,) bool; the gradient of an example with False is exactly zero.
        plan: strategies to take instead of those that would be chosen.
        has_aux: the loss returns `(loss, aux)`, aux a pytree of tensors that is kept beside the losses.

    Raises:
        TypeError: a parameter is not a float tensor.
        ValueError: the batch, the mask, the loss or the plan does not fit; the loss mixes examples by a batch norm.

    Cost: one forward pass of one example, one forward and one backward pass of the batch.
    """
    if batches.check("per_sample", batch, mask) == 0:
        raise ValueError("per_sample.factored: at least one example. Found an empty batch.")
    return Pass(loss_fn, params, plan, has_aux)(batch, mask)


class Pass:
    """The backward pass of one loss over chunk after chunk, which one survey serves."""

    def __init__(self, loss_fn: LossFn, params: Tree, plan: Plan | None = None, has_aux: bool = False) -> None:
        _check_params(params)
        self.loss_fn, self.params, self.plan, self.has_aux = loss_fn, params, plan, has_aux
        self.first: tuple[Survey, Sequence[Strategy | None]] | None = None

    def __call__(self, batch: Sequence[Tensor], mask: Tensor | None) -> Factored:
        """The factored gradients of a chunk, see `factored`."""
        batch = batches.blanked(batch, mask)
        first = self.first or self.look(batch)
        try:
            losses, terms, aux = self._factor(batch, *first)
        except Strayed:  # a module branches on its batch, as on whether there is any padding
            losses, terms, aux = self._factor(batch, *self._surveyed(batch, len(batch[0])))
        result = Factored(losses, terms, self.params, aux)
        return result if mask is None else result.masked(mask)

    def look(self, batch: Sequence[Tensor]) -> tuple[Survey, Sequence[Strategy | None]]:
        """The survey that serves all chunks, made by the first example of a batch, and the strategies that follow."""
        self.first = self._surveyed(batch, 1)
        return self.first

    def _surveyed(self, batch: Sequence[Tensor], rows: int) -> tuple[Survey, Sequence[Strategy | None]]:
        """What the loss does with its parameters, and the strategies that follow."""
        found = survey(self.loss_fn, self.params, batch, has_aux=self.has_aux, rows=rows)
        return found, strategies(self.params, found, self.plan)

    def _factor(
        self, batch: Sequence[Tensor], found: Survey, ways: Sequence[Strategy | None]
    ) -> tuple[Tensor, tuple[Term, ...], Tree]:
        return factor(self.loss_fn, self.params, batch, found, ways, has_aux=self.has_aux)


_ROUNDING = 16
"""Units in the last place by which sums over positions were seen to differ, with a margin."""


def _bounded(term: Term) -> Tensor:
    """The squared norms, and what rounding may have hidden of them."""
    squares, reach = term.square_norms(), term.reach()
    if reach is None:
        return squares
    return squares.clamp(min=0) + _ROUNDING * torch.finfo(squares.dtype).eps * reach.square()


def _root(squares: Tensor) -> Tensor:
    """The square root, whose gradient at zero is that of a norm: zero."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), squares)


def _check_params(params: Tree) -> None:
    paths = tree.paths(params)
    if len(set(paths)) < len(paths):
        raise ValueError(f"per_sample: parameters must have different paths. Found {paths}.")
    for path, leaf in zip(paths, tree.leaves(params), strict=True):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise TypeError(f"per_sample: every parameter must be a float tensor. Found {path}: {leaf!r:.80}.")
