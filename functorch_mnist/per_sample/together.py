"""Quantities of the sums of sample gradients over groups, `G(k) = Σ_{i: group_i = k} ∇_i`, of one parameter.

A group is an example with more positions: with `∇_i = Σ_t g_it a_itᵀ`, its sum is the same over the positions of all
its examples, and a term of groups of one size is a term of examples, see `Term.of_groups`. For that, sizes are looked
at. A program that is compiled or recorded may not look: it calls an operator, which looks when it runs. What has to be
differentiated in such a program, or is made of other weights, takes the pairs in one group from all pairs:

    |G(k)|² = Σ_{i, j: group_i = group_j = k} ⟨∇_i, ∇_j⟩
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from .. import native, tree
from ..compiler import constant_to_the_compiler
from ..losses.vocabulary import kernel
from .groups import Groups, Members, members, summed
from .layout import Layout, View
from .lookups import Lookup
from .squares import CAREFUL, Careful, Plain, ends, in_range, plain_total, power
from .terms import Absent, Convolution, Dense, Outer, Parts, Term, Viewed
from .uses import Sum
from .vocabulary import Vocabulary
from .weights import Pulled

_CANCELLED = 2.0**-10
"""Of the squared length that a sum could have, what is left where float32 products no longer tell it."""


def square_norms(term: Term, groups: Groups) -> Tensor:
    """|G|² of each row's group: (B,) in float64.

    Guarantees: as `Term.square_norms`; of float32 factors that cancel in a group, to float32's rounding of their sum.
    """
    if groups.members is not None:
        return _square_norms(term, groups.members)
    found = _called("square norms", term, groups.first, [len(groups.first)])
    return _of_pairs(term, groups.first) if found is None else found


def second_moment(term: Term, groups: Groups) -> Tensor:
    """`Σ_k G(k)²`, each group once, elementwise: shaped as the parameter, float32 or wider."""
    if groups.members is not None:
        return _second_moment(term, groups.members)
    found = _called("second moment", term, groups.first, list(term.shape()))
    if found is not None:
        return found
    sums = tree.wide(term.grads())
    return torch.zeros_like(sums).index_add(0, groups.first, sums).square().sum(0)


def reach(term: Term, groups: Groups, by: Careful = CAREFUL) -> Tensor:
    """(B,) in float64: what rounding errors of G are in proportion to, `Term.reach` of the group; 0 where none is."""
    own = term.reach(by)
    lengths = term.square_norms(by).clamp(min=0).sqrt() if own is None else own
    total = summed(groups.first, lengths.double())
    alone = summed(groups.first, torch.ones_like(lengths)) == 1
    return torch.where(alone, 0.0, total) if own is None else total


def _square_norms(term: Term, members: Members) -> Tensor:
    total = torch.zeros(members.groups, dtype=torch.float64, device=members.number.device)
    for groups, part in term.of_groups(members):
        total = total.index_copy(0, groups, _squares(part))
    return total[members.number]


def _squares(term: Term) -> Tensor:
    """The squared norms of a term: (B,) in float64, not below 0."""
    term = _beneath(term)
    if _dtype(term) == torch.float64:
        return term.square_norms().clamp(min=0)
    may_cancel = isinstance(term, Outer) and term.strategy == "gram"
    way = Plain()
    found = _with_reach(term, way, may_cancel)
    if in_range(ends(way.seen)) and not way.hides():
        found = plain_total(found.unbind())
    else:
        found = _with_reach(term, CAREFUL, may_cancel)
    squares, most = found.unbind()
    low = native.numbers(squares < _CANCELLED * most)
    if low is not None and low.dim() == 1 and low.any():
        rows = low.nonzero().squeeze(1)
        exact = tree.map(lambda x: x.double(), term.examples(rows)).square_norms(CAREFUL)
        squares = squares.index_copy(0, rows, exact)
    return squares.clamp(min=0)


def _beneath(term: Term) -> Term:
    """The term whose norms these are."""
    while isinstance(term, Viewed) or (isinstance(term, Pulled) and term.weight.selects):
        term = term.term
    return term


def _with_reach(term: Term, by: Careful, may_cancel: bool) -> Tensor:
    """The squared norms, and the squares that could cancel in them: (2, B), in float64 or plain."""
    squares = term.square_norms(by)
    reach = term.reach(by) if may_cancel else None
    return torch.stack([squares, torch.zeros_like(squares) if reach is None else reach.to(squares.dtype).square()])


def _second_moment(term: Term, members: Members) -> Tensor:
    parts = [part.second_moment() for _, part in term.of_groups(members)]
    return functools.reduce(torch.add, parts)


def _of_pairs(term: Term, first: Tensor) -> Tensor:
    """`square_norms` from the inner products of all pairs."""
    term = _beneath(term)
    c = torch.ones_like(first, dtype=torch.float64)
    if isinstance(term, (Outer, Convolution, Lookup, Vocabulary, Dense)) and _dtype(term) != torch.float64:
        lengths = term.square_norms().clamp(min=0).sqrt().detach()  # groups are taken to where squares are in range
        largest = torch.zeros_like(lengths).scatter_reduce(0, first, lengths, "amax")[first].float()
        c = power(largest)
        term = term.times(c)
    products = torch.where(first[:, None] == first, term.gram(term).double(), 0.0)
    return (summed(first, products.sum(1)) / c.double().square()).clamp(min=0)


def _dtype(term: Term) -> torch.dtype:
    return functools.reduce(
        torch.promote_types, [x.dtype for x in term.factors() if x.is_floating_point()], torch.float32
    )


def _called(quantity: str, term: Term, first: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The quantity by the operator; none where it cannot be written down for it, or has to be differentiated."""
    tensors: list[Tensor] = []
    written = _written(term, tensors)
    differentiable = torch.is_grad_enabled() and any([x.requires_grad for x in tensors])
    if written is None or native.level() or differentiable:
        return None
    found: Tensor = _OPERATOR(quantity, tensors, first, _text(written), shape, _dtype(term))
    return found


_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (Absent, Convolution, Dense, Layout, Lookup, Outer, Parts, Sum, View, Viewed, Vocabulary)
}
_TENSOR = "Tensor"


def _written(x: Any, tensors: list[Tensor]) -> Any:
    """A term as tuples, strings and numbers, its tensors in their order; none for one that holds anything else."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return _TENSOR
    if isinstance(x, torch.dtype):
        return ("dtype", str(x).removeprefix("torch."))
    if isinstance(x, tuple):
        parts = tuple([_written(part, tensors) for part in x])
        return None if None in parts else ("tuple", *parts)
    if isinstance(x, (str, int)):
        return x
    if is_dataclass(x) and type(x).__name__ in _KINDS:
        parts = tuple([_written(getattr(x, field.name), tensors) for field in fields(x)])
        return None if None in parts else (type(x).__name__, *parts)
    return None


def _read(written: Any, tensors: Iterator[Tensor]) -> Any:
    """The way back."""
    if written == _TENSOR:
        return next(tensors)
    if not isinstance(written, tuple):
        return written
    kind, *rest = written
    if kind == "dtype":
        return getattr(torch, rest[0])
    parts = [_read(part, tensors) for part in rest]
    return tuple(parts) if kind == "tuple" else _KINDS[kind](*parts)


@constant_to_the_compiler
def _text(written: Any) -> str:
    return repr(written)


@functools.cache
def _parsed(text: str) -> Any:
    return ast.literal_eval(text)


def _members(first: Tensor) -> Members:
    """`members`, found once for all parameters of a step."""
    global _LATEST
    known = _LATEST
    if known is None or known[0].device != first.device or not torch.equal(known[0], first):
        known = _LATEST = (first.clone(), members(first))
    return known[1]


_LATEST: tuple[Tensor, Members] | None = None


def _run(
    quantity: str,
    factors: Sequence[Tensor],
    first: Tensor,
    term: str,
    shape: Sequence[int],  # noqa: ARG001
    dtype: torch.dtype,
) -> Tensor:
    given: Term = _read(_parsed(term), iter(factors))
    of = _members(first)
    return _square_norms(given, of) if quantity == "square norms" else _second_moment(given, of).to(dtype).contiguous()


def _empty(
    quantity: str,
    factors: Sequence[Tensor],  # noqa: ARG001
    first: Tensor,
    term: str,  # noqa: ARG001
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return first.new_empty(shape, dtype=torch.float64 if quantity == "square norms" else dtype)


_OPERATOR = kernel(
    "of_groups",
    "(str quantity, Tensor[] factors, Tensor first, str term, SymInt[] shape, ScalarType dtype) -> Tensor",
    _run,
    _empty,
)
