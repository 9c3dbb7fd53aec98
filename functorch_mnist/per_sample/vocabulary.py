"""The output layer of a large vocabulary, where `losses.chunked_cross_entropy` takes it: a term that keeps no logits.

With c_it the cotangent of the loss at position t of example i and e_itv = softmax_v - [v = y_it], the output layer's
cotangent is g_itv = c_it e_itv: T · V numbers an example. The term keeps what g is made of, the hidden states, c, the
labels, the logarithm z of the softmax's sum and the weight, and recomputes g, a block of words at a time:

    ∇_i[v]      = Σ_t g_itv h_it
    Σ_i c_i ∇_i = an ordinary gradient of the loss, in blocks
    ⟨∇_i, ∇_j⟩  = Σ_{s, t} (h_is · h_jt) Σ_v g_isv g_jtv, or Σ_v ∇_i[v] · ∇_j[v], whichever is less work

The bias is a weight with one input, which is 1. A quantity is one operator to the compiler, for the reasons given in
`losses/vocabulary.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..batch import masked
from ..losses import vocabulary as blocks
from .forms import Cost, Sizes
from .rules import Entry, rule
from .squares import CAREFUL, Careful, power
from .terms import Strategy, Term, scaled
from .weights import pullback

_FEW = 16
"""Rows of sample gradients at a time, at least."""


@dataclass(frozen=True)
class VocabularyForm:
    """The loss of labels by an output layer (V, H) and its bias."""

    shape: tuple[int, int]
    of_weight: bool
    """Else of the bias."""
    biased: bool
    block: int
    """Words in a block, 0 for the default."""
    product: torch.dtype
    """Of the logits' products."""

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:  # noqa: ARG002 (the layer knows)
        return Sizes(1, math.prod(output), self.shape[1] if self.of_weight else 1, self.shape[0])

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        _, t, d, v = sizes
        costs: dict[Strategy, Cost] = {
            "gram": Cost(2 * t * t, 2 * t * t * (d + v)),
            "build": Cost(_FEW * d, 2 * t * v * d),
        }
        return {"outer product": Cost(0, 2 * (d + v)), **costs} if t == 1 else costs

    def factors(self, sizes: Sizes) -> int:
        return sizes.positions * (sizes.inputs + 1)

    @property
    def reads_rows(self) -> bool:
        """Whether it is a linear map to the rows of its weight."""
        return self.of_weight

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Vocabulary:
        hidden, labels, z, *layer = saved
        if all([len(x) == 1 or x.stride(0) == 0 for x in layer]):  # repeated, not of each example
            layer = [x[0] for x in layer]
        live = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        factors = hidden, cotangent.reshape(labels.shape), labels, z, tuple(layer), live
        return Vocabulary(*factors, self.of_weight, strategy, self.block, self.product)


@rule(blocks.LOSS)
def vocabulary_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    z: Tensor,
    losses: Tensor,  # noqa: ARG001 (the op's own)
    block: int,
) -> list[Entry]:
    """The cross-entropy of `softmax(h Wᵀ + b)`."""
    layer = [weight] if bias is None else [weight, bias]
    form = VocabularyForm((weight.shape[0], weight.shape[1]), True, bias is not None, block, hidden.dtype)
    saved: Any = (hidden, labels, z, *layer)
    return [Entry(weight, form, saved), Entry(bias, replace(form, of_weight=False), saved)]


@tree.register
@dataclass(frozen=True)
class Vocabulary(Term):
    """`∇_i[v] = Σ_t c_it (softmax_itv - [v = y_it]) a_it`, with a = h, or 1 for a bias."""

    hidden: Tensor
    """(B, T, H)."""
    c: Tensor
    """(B, T): cotangents of the losses."""
    labels: Tensor
    """(B, T) integers in [0, V)."""
    z: Tensor
    """(B, T): the logarithm of the softmax's sum."""
    layer: tuple[Tensor, ...]
    """The weight (V, H), and the bias (V,) where there is one; both (B, …) where one is another for each example."""
    live: Tensor
    """(B,) bool: which examples are not masked."""
    of_weight: bool = tree.static()
    """Else of the bias."""
    strategy: Strategy = tree.static()
    block: int = tree.static()
    product: torch.dtype = tree.static()

    def factors(self) -> tuple[Tensor, ...]:
        return self.hidden, self.c

    def shape(self) -> tuple[int, ...]:
        return tuple(self._shape)

    def examples(self, rows: slice | Tensor) -> Vocabulary:
        hidden, c, labels, z, live = (x[rows] for x in (self.hidden, self.c, self.labels, self.z, self.live))
        layer = self.layer if self.layer[0].dim() == 2 else tuple([x[rows] for x in self.layer])
        return replace(self, hidden=hidden, c=c, labels=labels, z=z, layer=layer, live=live)

    def in_groups(self, size: int) -> Iterator[Term]:
        if self.layer[0].dim() == 3:
            yield from super().in_groups(size)
            return
        hidden, c, labels, z, live = (
            x.unflatten(0, (-1, size)) for x in (self.hidden, self.c, self.labels, self.z, self.live)
        )
        hidden, c, labels, z = (x.flatten(1, 2) for x in (hidden, c, labels, z))
        yield replace(self, hidden=hidden, c=c, labels=labels, z=z, live=live.any(1)).settled()

    def settled(self) -> Vocabulary:
        t, d, v = *self.hidden.shape[1:], self.layer[0].shape[-2]
        return replace(self, strategy="gram" if t * (d + v) < d * v else "build")

    def columns(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        return (tree.wide(self.hidden), self.cotangents(rows)) if self.of_weight else None

    def cotangents(self, rows: Tensor) -> Tensor:
        """g[i, t, rows[i, s]]: (B, T, S), float32 or wider, for rows (B, S) of words, in any order."""
        weight = self.layer[0]
        if weight.dim() == 2:
            layer = [x[rows] for x in self.layer]
        else:
            at = rows[..., None].expand(*rows.shape, weight.shape[-1]), rows
            layer = [x.gather(1, index) for x, index in zip(self.layer, at, strict=False)]
        bias = layer[1] if len(layer) > 1 else None
        x = blocks.logits(self.hidden.to(self.product), layer[0].to(self.product), bias)  # (B, T, S)
        p = torch.exp(x - self._z()[..., None])
        own = self.labels[..., None] == rows[:, None, :]
        return self._kept((p - own.to(p.dtype)) * self.c[..., None])

    def grads(self) -> Tensor:
        return self._kept(self._fold("grads")).reshape(len(self.c), *self._shape)

    def masked(self, keep: Tensor) -> Vocabulary:
        layer = self.layer if self.layer[0].dim() == 2 else tuple([masked(x, keep) for x in self.layer])
        return replace(
            self,
            hidden=masked(self.hidden, keep),
            c=masked(self.c, keep),
            z=torch.where(keep[:, None], self.z, math.inf),  # no softmax is left
            layer=layer,
            live=self.live & keep,
        )

    def weighted_sum(self, weights: Tensor) -> Tensor:
        c = self.c * weights.to(self.c.dtype)[:, None]
        hidden, labels, z, c = self._rows(self.hidden, self.labels, self._z(), c)
        given = hidden, *self._pair(), labels, z, c, self.block, self.product, self.of_weight
        total: Tensor = blocks.SUM(*given)
        total = total.sum(0) if self.layer[0].dim() == 3 else total
        return self._kept(total, self.live.any())

    def dot(self, direction: Tensor) -> Tensor:
        return self._kept(self._fold("dot", direction.reshape(len(direction), -1)))

    def times(self, c: Tensor) -> Vocabulary:
        return replace(self, c=scaled(tree.wide(self.c), c))

    def square_norms(self, by: Careful = CAREFUL) -> Tensor:  # always careful, for c is small
        term, c = self._scaled()
        sums = term._fold("built squares" if self.strategy == "build" else "squares")
        return by.given(self._kept(sums.double() / c.square()))

    def reach(self, by: Careful = CAREFUL) -> Tensor | None:
        if self.c.shape[1] == 1:
            return None
        term, c = self._scaled()
        return by.given(self._kept(term._fold("reach").double() / c), root=True)

    def _scaled(self) -> tuple[Vocabulary, Tensor]:
        """The same at a scale at which numbers from 1e-31 times the largest of c have squares, and that scale (B,)."""
        if self.c.dtype == torch.float64:
            return self, self.c.new_ones(len(self.c))
        c = power(self.c, steps=(40, 40, 40, 20, 10)).clamp(max=2.0**100) * 2.0**25  # a softmax is off by 1 at most
        return self.times(c), c.double()

    def gram(self, other: Term) -> Tensor:
        if not isinstance(other, Vocabulary) or other.of_weight != self.of_weight:
            return super().gram(other)
        products = self._fold("gram", *other._factors(), *other.layer)
        return self._kept(products, self.live[:, None] & other.live)

    def second_moment(self) -> Tensor:
        return self._kept(self._fold("second moment"), self.live.any()).reshape(self._shape)

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        return self._kept(self._fold("project", left, right))

    @property
    def _shape(self) -> torch.Size:
        words, size = self.layer[0].shape[-2:]
        return torch.Size((words, size) if self.of_weight else (words,))

    def _z(self) -> Tensor:
        """z as what it is of the hidden states, the weight and the bias, for who differentiates it."""
        hidden, labels, z = self._rows(self.hidden, self.labels, self.z)
        found: Tensor = blocks.LOSS(hidden, *self._pair(), torch.full_like(labels, -1), z, z, self.block)
        return found.view(self.z.shape)

    def _rows(self, *factors: Tensor) -> list[Tensor]:
        """(B, T, …) as (B T, …), unless each example has a weight of its own."""
        return [x.flatten(0, 1) if self.layer[0].dim() == 2 else x for x in factors]

    def _pair(self) -> tuple[Tensor, Tensor | None]:
        return self.layer[0], self.layer[1] if len(self.layer) > 1 else None

    def _factors(self) -> list[Tensor]:
        return [self.hidden, self.c, self.labels, self._z()]

    def _fold(self, quantity: str, *others: Tensor) -> Tensor:
        found: Tensor = _FOLD(
            quantity, self._factors(), list(self.layer), list(others), self.of_weight, self.block, self.product
        )
        return found

    def _kept(self, values: Tensor, live: Tensor | None = None) -> Tensor:
        """Exact zeros of what is masked, should a parameter be infinite."""
        live = self.live.view(-1, *[1] * (values.dim() - 1)) if live is None else live
        return torch.where(live, values, torch.zeros((), dtype=values.dtype, device=values.device))


class _Given(NamedTuple):
    """What g is made of, and how."""

    hidden: Tensor
    c: Tensor
    labels: Tensor
    z: Tensor
    layer: Sequence[Tensor]
    """The weight (V, H) or (B, V, H), and the bias where there is one."""
    of_weight: bool
    product: torch.dtype

    def inputs(self) -> Tensor:
        """a (B, T, D), float32 or wider."""
        a = tree.wide(self.hidden)
        return a if self.of_weight else torch.ones_like(a[..., :1])

    def cotangents(self, block: int, plain: bool) -> Iterator[tuple[int, int, Tensor]]:
        """The first word of each block and of the next, and g (B, T, block), float32 or wider.

        Args:
            block: as in `spans`.
            plain: whether it is to be differentiated; if not, each g lies where the last one lay.
        """
        weight, bias = self.layer[0], self.layer[1] if len(self.layer) > 1 else None
        if not plain:
            maker = blocks.Block(self.hidden, weight, bias, block, self.product)
            for start, stop in maker.spans:
                yield start, stop, maker.errors(start, stop, self.labels, self.z).mul_(self.c[..., None])
            return
        for start, stop in blocks.spans(self.labels.numel(), weight.shape[-2], block, self.hidden.device.type):
            rows, shift = weight[..., start:stop, :], None if bias is None else bias[..., start:stop]
            _, e = blocks.errors(self.hidden.to(self.product), rows.to(self.product), shift, start, self.labels, self.z)
            yield start, stop, e * self.c[..., None]


def _pieces(g: Tensor, a: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """A block's words in parts whose sample gradients (B, part, D) are about as large as g."""
    size = max(_FEW, g.shape[1] * g.shape[2] // max(a.shape[2], 1))
    for first in range(0, stop - start, size):
        yield first, min(first + size, stop - start)


def _built(g: Tensor, a: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """The sample gradients of a block's words, (B, part, D)."""
    for first, last in _pieces(g, a, start, stop):
        yield g[..., first:last].mT @ a


def _squares(given: _Given, others: Sequence[Tensor], block: int, plain: bool) -> Tensor:  # noqa: ARG001
    a = given.inputs()
    products = a.new_zeros(len(a), a.shape[1], a.shape[1])
    for _, _, g in given.cotangents(block, plain):
        products = products + g @ g.mT
    return (products * (a @ a.mT)).sum((1, 2))


def _built_squares(given: _Given, others: Sequence[Tensor], block: int, plain: bool) -> Tensor:  # noqa: ARG001
    a = given.inputs()
    total = a.new_zeros(len(a))
    for start, stop, g in given.cotangents(block, plain):
        for part in _built(g, a, start, stop):
            total = total + part.square().sum((1, 2))
    return total


def _reach(given: _Given, others: Sequence[Tensor], block: int, plain: bool) -> Tensor:  # noqa: ARG001
    squares = torch.stack([g.square().sum(-1) for _, _, g in given.cotangents(block, plain)]).sum(0)
    return (squares * given.inputs().square().sum(-1)).sqrt().sum(1)


def _dot(given: _Given, others: Sequence[Tensor], block: int, plain: bool) -> Tensor:
    a, direction = given.inputs(), others[0]
    dtype = torch.promote_types(a.dtype, direction.dtype)
    total = a.new_zeros(len(a), dtype=dtype)
    for start, stop, g in given.cotangents(block, plain):
        total = total + (a.to(dtype) @ direction[start:stop].to(dtype).mT * g).sum((1, 2))
    return total


def _grads(given: _Given, others: Sequence[Tensor], block: int, plain: bool) -> Tensor:  # noqa: ARG001
    a = given.inputs()
    return torch.cat([g.mT @ a for _, _, g in given.cotangents(block, plain)], 1)


def _second_moment(given: _Given, others: Sequence[Tensor], block: int, plain: bool) -> Tensor:  # noqa: ARG001
    a = given.inputs()
    parts = []
    for start, stop, g in given.cotangents(block, plain):
        if a.shape[1] == 1:
            parts.append(g[:, 0].square().mT @ a[:, 0].square())
        else:
            parts += [part.square().sum(0) for part in _built(g, a, start, stop)]
    return torch.cat(parts)


def _project(given: _Given, others: Sequence[Tensor], block: int, plain: bool) -> Tensor:
    a, (left, right) = given.inputs(), others
    total = a.new_zeros(len(a), len(left), a.shape[1])
    for start, stop, g in given.cotangents(block, plain):
        total = total + left[:, start:stop].to(g.dtype) @ g.mT
    return total @ (a @ right.to(a.dtype).mT)


def _gram(given: _Given, others: Sequence[Tensor], block: int, plain: bool) -> Tensor:
    theirs = given._replace(hidden=others[0], c=others[1], labels=others[2], z=others[3], layer=others[4:])
    a, b = given.inputs(), theirs.inputs()
    mine, yours = a.shape[:2].numel(), b.shape[:2].numel()
    words, d = given.layer[0].shape[-2], a.shape[2]
    start, stop = blocks.spans(mine + yours, words, block, a.device.type)[0]
    size = stop - start
    pairs = mine * yours * (words + d) <= ((mine + yours) + len(a) * len(b)) * words * d
    pairs = pairs and mine * yours <= (mine + yours) * size
    total = a.new_zeros((mine, yours) if pairs else (len(a), len(b)))
    both = zip(given.cotangents(size, plain), theirs.cotangents(size, plain), strict=True)
    for (start, stop, g), (_, _, f) in both:
        if pairs:
            total = total + g.flatten(0, 1) @ f.flatten(0, 1).mT
            continue
        for first, last in _pieces(g if len(a) * d > len(b) * d else f, a, start, stop):
            part, other = g[..., first:last].mT @ a, f[..., first:last].mT @ b
            total = total + part.flatten(1) @ other.flatten(1).mT
    if not pairs:
        return total
    total = total * (a.flatten(0, 1) @ b.flatten(0, 1).mT)
    return total.view(*a.shape[:2], *b.shape[:2]).sum((1, 3))


_QUANTITIES: dict[str, Callable[[_Given, Sequence[Tensor], int, bool], Tensor]] = {
    "squares": _squares, "built squares": _built_squares, "reach": _reach, "dot": _dot, "grads": _grads,
    "second moment": _second_moment, "project": _project, "gram": _gram,
}  # fmt: skip


def _folded(plain: bool) -> Callable[..., Tensor]:
    def fold(
        quantity: str,
        factors: Sequence[Tensor],
        layer: Sequence[Tensor],
        others: Sequence[Tensor],
        of_weight: bool,
        block: int,
        product: torch.dtype,
    ) -> Tensor:
        given = _Given(factors[0], factors[1], factors[2], factors[3], layer, of_weight, product)
        with blocks.as_given(factors[0]):
            return _QUANTITIES[quantity](given, others, block, plain).contiguous()

    return fold


class _Fold(torch.autograd.Function):
    """A quantity; differentiated, as the plain ops that it is made of."""

    @staticmethod
    def forward(quantity: str, counts: tuple[int, ...], rest: tuple[Any, ...], *xs: Tensor) -> Tensor:
        kernel = torch.ops.functorch_mnist.vocabulary_fold_kernel.default
        found: Tensor = kernel(quantity, *_parted(xs, counts), *rest)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[3:])
        ctx.static = inputs[:3]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        quantity, counts, rest = ctx.static
        saved, needs = list(ctx.saved_tensors), list(ctx.needs_input_grad[3:])

        def plain(*xs: Tensor) -> Tensor:
            given = iter(xs)
            every = [next(given) if need else x for x, need in zip(saved, needs, strict=True)]
            return _folded(True)(quantity, *_parted(every, counts), *rest)

        _, pull = pullback(plain, *[x for x, need in zip(saved, needs, strict=True) if need])
        found = iter(pull(cotangent))
        return (None, None, None, *[next(found) if need else None for need in needs])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        def of(i: int) -> list[Any]:
            return [x if axis is None else x.select(axis, i) for x, axis in zip(inputs[3:], in_dims[3:], strict=True)]

        return torch.stack([_Fold.apply(*inputs[:3], *of(i)) for i in range(info.batch_size)]), 0


def _parted(xs: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    given = iter(xs)
    return [[next(given) for _ in range(count)] for count in counts]


def _fold(
    quantity: str,
    factors: Sequence[Tensor],
    layer: Sequence[Tensor],
    others: Sequence[Tensor],
    of_weight: bool,
    block: int,
    product: torch.dtype,
) -> Tensor:
    counts = len(factors), len(layer), len(others)
    found: Tensor = _Fold.apply(quantity, counts, (of_weight, block, product), *factors, *layer, *others)
    return found


_SCHEMA = (
    "(str quantity, Tensor[] factors, Tensor[] layer, Tensor[] others, bool of_weight, SymInt block, "
    "ScalarType product) -> Tensor"
)
blocks.kernel("vocabulary_fold_kernel", _SCHEMA, _folded(False), _folded(True))
_FOLD = blocks.operator("vocabulary_fold", _SCHEMA, _fold)
