"""Weights: tensors that are made of parameters alone, and how their sample gradients lead to those of the parameters.

A parameter is a weight; so is each of its views, and whatever ops make of weights and constants: a normalised weight, a
low-rank product, a slice. An op takes its factors for the weight that it gets. Where W = f(w), the way back is linear,

    ∇_i by w = Jᵀ ∇_i by W,    J = ∂f/∂w

so sums are summed first and taken back once, and inner products with a direction v are those with J v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from .. import tree
from ..ops import nested
from .groups import Members
from .layout import View
from .squares import CAREFUL, Careful
from .terms import Term

SELECTING = (
    Tensor.__getitem__, Tensor.chunk, Tensor.split, Tensor.narrow, Tensor.select, Tensor.unbind, Tensor.unfold,
    torch.chunk, torch.split, torch.narrow, torch.select, torch.unbind, torch.tensor_split, Tensor.tensor_split,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Made:
    """An op of weights and constants."""

    op: Callable[..., Any]
    args: Any
    """With a `Weight` in the place of each."""
    kwargs: Any
    output: int | None
    """Which of several outputs; none where there is one."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor made of parameters."""

    leaves: tuple[int, ...]
    """The numbers of the parameters."""
    made: Made | None = None
    """How; none where it is the parameter itself, but for"""
    views: tuple[View, ...] = ()
    """the views taken last."""

    def viewed(self, view: View) -> Weight:
        return replace(self, views=(*self.views, view))

    def value(self, leaves: Mapping[int, Tensor]) -> Tensor:
        """Its numbers, from those of the parameters."""
        if self.made is None:
            value = leaves[self.leaves[0]]
        else:
            out = self.made.op(*_filled(self.made.args, leaves), **_filled(self.made.kwargs, leaves))
            value = out if self.made.output is None else out[self.made.output]
        for view in self.views:
            value = view.forward(value)
        return value

    @property
    def selects(self) -> bool:
        """Whether each of its numbers is another one of one parameter's: norms are then those of the parameter."""
        if self.made is None:
            return True
        source = self.made.args[0] if self.made.args else None
        plain = self.made.op in SELECTING and isinstance(source, Weight) and source.selects
        return plain and all([_is_plain(x) for x in (*self.made.args[1:], *self.made.kwargs.values())])


def _is_plain(index: Any) -> bool:
    """Whether an index takes no number twice."""
    if isinstance(index, (list, tuple)):
        return all([_is_plain(x) for x in index])
    return index is None or index is Ellipsis or isinstance(index, (int, slice))


def _filled(value: Any, leaves: Mapping[int, Tensor]) -> Any:
    return nested(lambda x: x.value(leaves) if isinstance(x, Weight) else x, value)


@tree.register
@dataclass(frozen=True)
class Pulled(Term):
    """Sample gradients by a parameter, from those by a weight that is made of it."""

    term: Term
    """Of the weight."""
    params: tuple[Tensor, ...]
    """All parameters of the weight."""
    weight: Weight = tree.static()
    leaf: int = tree.static()
    """The number of the parameter."""

    def factors(self) -> tuple[Tensor, ...]:
        return self.term.factors()

    def shape(self) -> tuple[int, ...]:
        return tuple(self._here().shape)

    def examples(self, rows: slice | Tensor) -> Pulled:
        return replace(self, term=self.term.examples(rows))

    def of_groups(self, members: Members) -> Iterator[tuple[Tensor, Term]]:
        for groups, term in self.term.of_groups(members):
            yield groups, replace(self, term=term)

    def grads(self) -> Tensor:
        pull = self._pull()
        return vmap(pull)(self.term.grads())

    def masked(self, keep: Tensor) -> Pulled:
        return replace(self, term=self.term.masked(keep))

    def built(self) -> Pulled:
        return replace(self, term=self.term.built())

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self._pull()(self.term.weighted_sum(weights))

    def dot(self, direction: Tensor) -> Tensor:
        (pushed,) = pushed_forward(lambda param: (self._of(param),), self._here(), direction)
        return self.term.dot(pushed)

    def square_norms(self, by: Careful = CAREFUL) -> Tensor:
        return self.term.square_norms(by) if self.weight.selects else super().square_norms(by)

    def reach(self, by: Careful = CAREFUL) -> Tensor | None:
        return self.term.reach(by) if self.weight.selects else None

    def gram(self, other: Term) -> Tensor:
        if isinstance(other, Pulled) and self.weight.selects and other.weight is self.weight:
            return self.term.gram(other.term)
        return super().gram(other)

    def _here(self) -> Tensor:
        return self.params[self.weight.leaves.index(self.leaf)]

    def _of(self, param: Tensor) -> Tensor:
        values = dict(zip(self.weight.leaves, self.params, strict=True))
        return self.weight.value({**values, self.leaf: param})

    def _pull(self) -> Callable[[Tensor], Tensor]:
        weight, pull = pullback(self._of, self._here())

        def pulled(cotangent: Tensor) -> Tensor:
            back: Tensor = pull(cotangent.to(weight.dtype))[0]
            return back

        return pulled


def pullback(fn: Callable[..., Any], *here: Any) -> tuple[Any, Callable[..., Any]]:
    """A function's value at a point, and `Jᵀ u` as a function of u."""
    pair: Any = vjp(fn, *here)
    return pair[0], pair[1]


def pushed_forward(fn: Callable[[Tensor], tuple[Tensor, ...]], here: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
    """`J v` of a function at a point, by two vector-Jacobian products: `Jᵀ u` is linear in u."""
    outputs, pull = pullback(fn, here)
    _, push = pullback(lambda cotangents: pull(cotangents)[0], outputs)
    pushed: tuple[Tensor, ...] = push(direction.to(here.dtype))[0]
    return pushed
