"""Sample gradients of one parameter, in factored form.

A term is what an op adds to the sample gradients of a parameter W, kept as the op's input `a` and the cotangent `g` of
its output. The ops are linear in W, so with V shaped as W

    ∇_i          = the op's vector-Jacobian product of g_i at a_i
    Σ_i c_i ∇_i  = the same of c_i g_i, summed over i: an ordinary backward pass of the op
    ⟨∇_i, V⟩     = ⟨g_i, op(a_i; V)⟩: an ordinary forward pass of the op

and where the op reads W as G matrices (H, D) at T positions, for each of them `∇_i = Σ_t g_it a_itᵀ`, so

    ⟨∇_i, ∇_j⟩   = Σ_{s, t} (a_is · a_jt) (g_is · g_jt)

which is |a|² |g|² for i = j and T = 1. Inner products are taken by one of three strategies: as this outer product, as
the two Gram matrices (T, T), or by building ∇_i for this parameter alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from .. import tree
from ..batch import masked
from ..compiler import stored
from ..products import sum_of_outer
from .groups import Members
from .layout import Layout, View, as_matrices, as_parameter, kernel_layout, layout
from .squares import CAREFUL, Careful, row_sums

Strategy: TypeAlias = Literal["outer product", "gram", "build", "unfold", "grouped convolution", "sum", "pairs"]
"""How inner products are taken; `"pairs"`: of each pair of uses. A convolution builds its gradients in one of two ways,
`"unfold"`: as products of patches, or `"grouped convolution"`: with the examples as groups."""

BUILDS: tuple[Strategy, ...] = ("build", "unfold", "grouped convolution")
"""The strategies that build the sample gradients; `"build"` takes the way that is counted to move less memory."""

_SMALL = 16
"""So many times the numbers of its factors, sample gradients are summed sooner than groups by size are looked at."""

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_WEIGHT_GRADIENTS: dict[int, Any] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


@tree.register
@dataclass(frozen=True)
class Kronecker:
    """The factors of one parameter's Kronecker-factored second moment, summed over examples and positions."""

    inputs: Tensor
    """`Σ a aᵀ`, (G, D, D); for an embedding its diagonal (V,), the counts of the rows."""
    cotangents: Tensor
    """`Σ g gᵀ`, (G, H, H)."""
    layout: Layout = tree.static()
    """How the parameter, or the last of its views, reads as matrices (G, H, D)."""
    views: tuple[View, ...] = tree.static()
    bias: str | None = field(default=None, metadata={"static": True})
    """The path of the bias that the same op adds: it is the column of an input that is always 1."""
    sums: Tensor | tuple[()] = ()
    """Where there is a bias, `Σ [a, 1]`, (G, D + 1): the column and the row of that input."""

    @property
    def diagonal(self) -> bool:
        """Whether `inputs` is a diagonal."""
        return self.inputs.dim() == 1

    def matrices(self, v: Tensor) -> Tensor:
        """What is shaped as the parameter, as matrices (G, H, D)."""
        return as_matrices(v, self.layout, self.views)

    def parameter(self, m: Tensor) -> Tensor:
        """The way back."""
        return as_parameter(m, self.layout, self.views)

    @property
    def joined(self) -> Tensor:
        """`inputs` with the input of the bias: (G, D + 1, D + 1); without a bias `inputs`."""
        if isinstance(self.sums, tuple):
            return self.inputs
        rows = torch.cat([self.inputs, self.sums[:, None, :-1]], 1)
        return torch.cat([rows, self.sums[:, :, None]], 2)


class Term:
    """Sample gradients (B, *w) of one parameter. What a subclass does not know better is done by building them.

    They are built for as many examples at a time as take no more memory than the factors do.
    """

    def grads(self) -> Tensor:
        """∇_i: (B, *w)."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, ...]:
        """What is kept of the examples, (B, …) each."""
        raise NotImplementedError

    def shape(self) -> tuple[int, ...]:
        """(*w)."""
        raise NotImplementedError

    def examples(self, rows: slice | Tensor) -> Term:
        """The same of some examples."""
        found: Term = tree.map(lambda x: x[rows], self)
        return found

    def at_once(self) -> int:
        """As many examples as have gradients that outgrow neither the factors nor the parameter."""
        return max(1, sum([x.numel() for x in self.factors()]) // max(1, math.prod(self.shape())))

    def in_parts(self, at_once: int | None = None) -> list[Term]:
        """Terms of some examples after others, by default of `at_once`."""
        rows = len(self.factors()[0])
        if at_once is None:
            at_once = self.at_once()
        if at_once >= rows:
            return [self]
        return [self.examples(slice(i, min(i + at_once, rows))) for i in range(0, rows, at_once)]

    def of_groups(self, members: Members) -> Iterator[tuple[Tensor, Term]]:
        """Terms of groups, each one example whose gradient is the sum of its examples', and the groups' numbers."""
        for groups, rows, size in members.alike:
            part = self if members.groups == len(members.number) else self.examples(rows)
            done = 0
            for term in [part] if size == 1 else part.in_groups(size):
                count = len(term.factors()[0])
                yield groups[done : done + count], term
                done += count

    def in_groups(self, size: int) -> Iterator[Term]:
        """The same with each `size` examples, one after another, as one: an example with the positions of all.

        What has no positions is summed, in terms after one another that outgrow the factors no more than `in_parts`.
        """
        at_once = self.at_once() // size * size
        for part in self.in_parts(at_once or size):
            if at_once:
                yield Dense(tree.wide(part.grads()).unflatten(0, (-1, size)).sum(1))
            else:
                factor = part.factors()[0]
                yield Dense(tree.wide(part.weighted_sum(torch.ones(size, device=factor.device)))[None])

    def masked(self, keep: Tensor) -> Term:
        """Exactly zero where `keep` (B,) is False, whatever the factors hold there."""
        raise NotImplementedError

    def built(self) -> Term:
        """Itself, or the sample gradients where inner products take them anyway and they are no larger than factors."""
        return self

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Σ_i c_i ∇_i, shaped as the parameter, for weights c (B,)."""
        return scaled(self.grads(), weights).sum(0)

    def inner(self, other: Term) -> Tensor:
        """⟨∇_i, ∇'_i⟩, with a term of the same parameter and examples: (B,)."""
        mine = self.in_parts()
        theirs = other.in_parts(len(mine[0].factors()[0]))
        products = [row_sums(tree.wide(x.grads()) * y.grads()) for x, y in zip(mine, theirs, strict=True)]
        return joined(products)

    def dot(self, direction: Tensor) -> Tensor:
        """⟨∇_i, V⟩: (B,), for V shaped as the parameter."""
        return row_sums(tree.wide(self.grads()) * direction)

    def columns(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        """Of a linear map from D columns to V rows, `∇_i = Σ_t g_it a_itᵀ`: a (B, T, D), and g at rows (B, S).

        None for what is none.
        """
        return None

    def settled(self) -> Term:
        """Itself, with its inner products by the cheaper strategy: where it is one of several uses."""
        return self

    def times(self, c: Tensor) -> Term:
        """c_i ∇_i, in float32 or wider, for powers of two c (B,)."""
        return Dense(scaled(tree.wide(self.grads()), c))

    def square_norms(self, by: Careful = CAREFUL) -> Tensor:
        """|∇_i|²: (B,), in float64."""
        return joined([by.squares(part.grads()) for part in self.in_parts()])

    def reach(self, by: Careful = CAREFUL) -> Tensor | None:  # noqa: ARG002
        """(B,) in float64: `Σ_t |g_it| |a_it|`, at least |∇_i|.

        Rounding errors of norms and sums of ∇_i are in proportion to it. None where there is no sum over positions
        whose rounding could hide what cancels.
        """
        return None

    def gram(self, other: Term) -> Tensor:
        """⟨∇_i, ∇'_j⟩: (B, B'), with a term of the same parameter and kind."""
        mine, theirs = self.in_parts(), other.in_parts()
        rows = [joined([_products(part.grads(), more.grads()).T for more in theirs]).T for part in mine]
        return joined(rows)

    def second_moment(self) -> Tensor:
        """Σ_i ∇_i², elementwise, shaped as the parameter."""
        parts = [tree.wide(part.grads()).square().sum(0) for part in self.in_parts()]
        return functools.reduce(torch.add, parts)

    def kronecker(self, ones: Tensor | None = None) -> Kronecker | None:  # noqa: ARG002 (of a bias with it)
        """The Kronecker factors, or none where the parameter has none.

        Args:
            ones: (B,), the input of a bias that the same op adds: 1, or 0 for an example that does not count.
        """
        return None

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        """`L ∇_i Rᵀ`, (B, h, d), of the gradient as a matrix (H, D) with its first axis as rows; L (h, H), R (d, D)."""
        sizes = left.shape[1], right.shape[1]
        return joined(
            [
                left @ tree.wide(part.grads()).reshape(len(part.factors()[0]), *sizes) @ right.T
                for part in self.in_parts()
            ]
        )

    def pair(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        """`L g_i` (B, h) and `R a_i` (B, d), whose outer product `project` is; none where it is not known to be one."""
        return None

    def sides(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """`Σ_i c_i² ∇_i ∇_iᵀ` (H, H) and `Σ_i c_i² ∇_iᵀ ∇_i` (D, D), of the gradients as matrices, see `project`."""
        parts = self.in_parts()
        rows = weights.split([len(part.factors()[0]) for part in parts])
        matrices = [scaled(tree.wide(part.grads()), c) for part, c in zip(parts, rows, strict=True)]
        matrices = [m.reshape(len(m), m.shape[1] if m.dim() > 1 else 1, -1) for m in matrices]
        left = torch.stack([sum_of_outer(x, x) for m in matrices for x in [m.transpose(1, 2).flatten(0, 1)]]).sum(0)
        right = torch.stack([sum_of_outer(x, x) for m in matrices for x in [m.flatten(0, 1)]]).sum(0)
        return left, right


@tree.register
@dataclass(frozen=True)
class Dense(Term):
    """Sample gradients as they are."""

    values: Tensor
    """(B, *w)."""

    def factors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    def grads(self) -> Tensor:
        return self.values

    def of_groups(self, members: Members) -> Iterator[tuple[Tensor, Term]]:
        return Parts((self.values,)).of_groups(members)

    def masked(self, keep: Tensor) -> Dense:
        return Dense(masked(self.values, keep))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return weighted(self.values, weights)


@tree.register
@dataclass(frozen=True)
class Absent(Term):
    """Sample gradients by a parameter that the loss does not use: zeros, in no memory."""

    zeros: Tensor
    """(B, *w)."""

    def factors(self) -> tuple[Tensor, ...]:
        return (self.zeros,)

    def shape(self) -> tuple[int, ...]:
        return tuple(self.zeros.shape[1:])

    def grads(self) -> Tensor:
        return self.zeros

    def of_groups(self, members: Members) -> Iterator[tuple[Tensor, Term]]:
        yield torch.arange(members.groups, device=self.zeros.device), Absent(self.zeros[: members.groups])

    def masked(self, keep: Tensor) -> Absent:  # noqa: ARG002 (zeros are zeros)
        return self

    def weighted_sum(self, weights: Tensor) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(self.zeros[0], memory_format=torch.contiguous_format)

    def dot(self, direction: Tensor) -> Tensor:  # noqa: ARG002
        return tree.wide(self.zeros.new_zeros(len(self.zeros)))

    def square_norms(self, by: Careful = CAREFUL) -> Tensor:  # noqa: ARG002
        return self.zeros.new_zeros(len(self.zeros), dtype=torch.float64)

    def gram(self, other: Term) -> Tensor:
        return tree.wide(self.zeros.new_zeros(len(self.zeros), len(other.factors()[0])))

    def second_moment(self) -> Tensor:
        return tree.wide(self.weighted_sum(self.zeros))


@tree.register
@dataclass(frozen=True)
class Parts(Term):
    """Sample gradients as they are, of some examples after others: what comes in parts is not copied into one."""

    values: tuple[Tensor, ...]
    """(B_k, *w) each, of B examples in all."""

    def factors(self) -> tuple[Tensor, ...]:
        return self.values

    def shape(self) -> tuple[int, ...]:
        return tuple(self.values[0].shape[1:])

    def in_parts(self, at_once: int | None = None) -> list[Term]:
        return [Dense(part) for part in self.values] if at_once is None else Dense(self.grads()).in_parts(at_once)

    def grads(self) -> Tensor:
        return self.values[0] if len(self.values) == 1 else torch.cat(self.values)

    def of_groups(self, members: Members) -> Iterator[tuple[Tensor, Term]]:
        sums = tree.wide(self.values[0].new_zeros(members.groups, *self.shape()))
        for part, number in self._with(members.number):
            sums = sums.index_add(0, number, part.to(sums.dtype))
        yield torch.arange(members.groups, device=sums.device), Dense(sums)

    def masked(self, keep: Tensor) -> Parts:
        return Parts(tuple([masked(part, rows) for part, rows in self._with(keep)]))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return torch.stack([weighted(part, rows) for part, rows in self._with(weights)]).sum(0)

    def dot(self, direction: Tensor) -> Tensor:
        return joined([Dense(part).dot(direction) for part in self.values])

    def _with(self, rows: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(self.values, rows.split([len(part) for part in self.values]), strict=True)


@tree.register
@dataclass(frozen=True)
class Outer(Term):
    """A linear map at T positions: `∇_i = Σ_t g_it a_itᵀ`."""

    a: Tensor
    """(B, G, T, D)."""
    g: Tensor
    """(B, G, T, H)."""
    layout: Layout = tree.static()
    strategy: Strategy = tree.static()

    def factors(self) -> tuple[Tensor, ...]:
        return self.a, self.g

    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    def grads(self) -> Tensor:
        if self.a.shape[-1] < self.g.shape[-1]:  # a product is faster with its longer side last
            return self.layout.parameter((self.a.transpose(-2, -1) @ self.g).transpose(-2, -1))
        return self.layout.parameter(self.g.transpose(-2, -1) @ self.a)

    def of_groups(self, members: Members) -> Iterator[tuple[Tensor, Term]]:
        factors = sum([x[0].numel() for x in (self.a, self.g)])
        if math.prod(self.layout.shape) <= _SMALL * factors:
            yield from Dense(tree.wide(self.grads())).of_groups(members)
        else:
            yield from super().of_groups(members)

    def in_groups(self, size: int) -> Iterator[Term]:
        a, g = (x.unflatten(0, (-1, size)).transpose(1, 2).flatten(2, 3) for x in (self.a, self.g))
        yield replace(self, a=a, g=g).settled()

    def masked(self, keep: Tensor) -> Outer:
        return replace(self, a=masked(self.a, keep), g=masked(self.g, keep))

    def times(self, c: Tensor) -> Outer:
        return replace(self, a=tree.wide(self.a), g=scaled(tree.wide(self.g), c))

    def built(self) -> Term:
        return Dense(self.grads()) if _builds(self, self.layout.shape, self.a, self.g) else self

    def weighted_sum(self, weights: Tensor) -> Tensor:
        if self.a.shape[-1] < self.g.shape[-1]:  # fewer numbers to scale
            return self.layout.parameter(product(self.g, scaled(self.a, weights)))
        return self.layout.parameter(product(scaled(self.g, weights), self.a))

    def dot(self, direction: Tensor) -> Tensor:
        a, direction = common(self.a, direction)
        outputs = a @ self.layout.matrices(direction).transpose(-2, -1)
        return (outputs * self.g).sum((1, 2, 3))

    def square_norms(self, by: Careful = CAREFUL) -> Tensor:
        if self.strategy == "build":
            return super().square_norms(by)
        if self.strategy == "outer product":
            a, g = by.pairs(self.a, self.g, 2)
            return by.whole((a * g).sum(1))
        a, g, c = by.balanced(self.a, self.g)
        return by.unscaled(((a @ a.transpose(-2, -1)) * (g @ g.transpose(-2, -1))).sum((1, 2, 3)), c, a, g)

    def columns(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.layout != layout(self.layout.shape) or self.layout.sizes[0] > 1:
            return None
        a, g = tree.wide(self.a[:, 0]), self.g[:, 0]
        return a, g.gather(2, rows[:, None, :].expand(-1, g.shape[1], -1))

    def settled(self) -> Outer:
        t, d, h = self.a.shape[2], self.a.shape[3], self.g.shape[3]
        return replace(self, strategy="gram" if t * (d + h) < d * h else "build")

    def reach(self, by: Careful = CAREFUL) -> Tensor | None:
        if self.a.shape[2] == 1:
            return None
        a, g = by.pairs(self.a, self.g, 3)
        return (a.sqrt() * g.sqrt()).sum((1, 2))

    def gram(self, other: Term) -> Tensor:
        if not isinstance(other, Outer):
            return super().gram(other)
        (b, groups, t), (other_b, other_t) = self.a.shape[:3], (other.a.shape[0], other.a.shape[2])
        count = groups * b * t * other_b * other_t
        if count > (b + other_b) * math.prod(self.layout.shape):
            return super().gram(other)  # the gradients are smaller than the products of all pairs of positions
        factors = sum([x.numel() for x in (*self.factors(), *other.factors())])
        tiles = min(max(1, b), -(-count // max(1, factors)))  # no more products at a time than there are factors
        rows = max(1, -(-b // max(1, tiles)))
        return joined([part._pairs(other) for part in self.in_parts(rows) if isinstance(part, Outer)])

    def _pairs(self, other: Outer) -> Tensor:
        """⟨∇_i, ∇'_j⟩ by the inner products of all pairs of positions."""
        (b, groups, t), (other_b, other_t) = self.a.shape[:3], (other.a.shape[0], other.a.shape[2])
        products = pairs(self.a, other.a) * pairs(self.g, other.g)  # (G, B T, B' T')
        return products.view(groups, b, t, other_b, other_t).sum((0, 2, 4))

    def second_moment(self) -> Tensor:
        if self.a.shape[2] > 1:
            return super().second_moment()
        return self.layout.parameter(product(tree.wide(self.g).square(), tree.wide(self.a).square()))

    def kronecker(self, ones: Tensor | None = None) -> Kronecker:
        a, g = tree.wide(self.a), tree.wide(self.g)
        pair = Kronecker(product(a, a), product(g, g), self.layout, ())
        if ones is None:
            return pair
        count = (ones.to(a.dtype).sum() * a.shape[2]).expand(a.shape[1], 1)
        return replace(pair, sums=torch.cat([a.sum((0, 2)), count], 1))

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        if self.a.shape[1] > 1 or self.layout.order != (0, 1):
            return super().project(left, right)
        a, g = tree.wide(self.a)[:, 0] @ right.T, tree.wide(self.g)[:, 0] @ left.T
        return g.transpose(-2, -1) @ a

    def pair(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.a.shape[1:3] != (1, 1) or self.layout.order != (0, 1):
            return None
        return tree.wide(self.g)[:, 0, 0] @ left.T, tree.wide(self.a)[:, 0, 0] @ right.T

    def sides(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self.a.shape[1:3] != (1, 1) or self.layout.order != (0, 1):
            return super().sides(weights)
        a, g = tree.wide(self.a)[:, 0, 0], scaled(tree.wide(self.g)[:, 0, 0], weights)
        left, right = (scaled(x, row_sums(y.square()).sqrt()) for x, y in ((g, a), (a, g)))
        return left.T @ left, right.T @ right


_AT_ONCE = 128
"""Examples in one grouped convolution, or nearly that many: fewer bound the copies it makes, and take no more time."""


@tree.register
@dataclass(frozen=True)
class Convolution(Term):
    """A convolution, whose weight's gradient is the correlation of its input with the cotangent.

    A transposed convolution swaps the two: its cotangent is the image here, its input the cotangent.
    """

    image: Tensor
    """(B, N, channels, *space): N images of each example."""
    cotangent: Tensor
    """(B, N, outputs, *positions)."""
    kernel: tuple[int, ...] = tree.static()
    """Of the weight: (outputs, channels / groups, *kernel)."""
    stride: tuple[int, ...] = tree.static()
    padding: tuple[int, ...] = tree.static()
    dilation: tuple[int, ...] = tree.static()
    groups: int = tree.static()
    strategy: Strategy = tree.static()

    def factors(self) -> tuple[Tensor, ...]:
        return self.image, self.cotangent

    def shape(self) -> tuple[int, ...]:
        return self.kernel

    def grads(self) -> Tensor:
        return self._parts().grads()

    def _parts(self) -> Parts:
        if not self._by_groups():
            return Parts((self.outer().grads(),))
        count = max(1, round(len(self.image) / _AT_ONCE))
        parts = zip(self.image.tensor_split(count), self.cotangent.tensor_split(count), strict=True)
        return Parts(tuple([self._grads_by_groups(image, cotangent) for image, cotangent in parts]))

    def _by_groups(self) -> bool:
        """Whether the gradients are built by a grouped convolution.

        It copies image and cotangent; products read each pixel for each offset of the kernel. bfloat16 and GPUs have
        fast kernels of products alone.
        """
        if self.strategy in ("unfold", "grouped convolution"):
            return self.strategy == "grouped convolution"
        copied = self.kernel[1] * math.prod(self.stride) + self.kernel[0] // self.groups
        has_kernels = self.image.device.type == "cpu" and self.image.dtype != torch.bfloat16
        return has_kernels and copied < math.prod(self.kernel[1:])

    def _grads_by_groups(self, image: Tensor, cotangent: Tensor) -> Tensor:
        """The examples as groups of one convolution: as fast as the ordinary weight gradient, given channels first.

        It is one in three dimensions, for the compiler would store what enters one in two dimensions channels last.
        """
        b, n = image.shape[:2]
        flat = (1,) * (3 - len(self.stride))
        grads: Tensor = conv3d_weight(
            image.transpose(0, 1).reshape(n, b * image.shape[2], *flat, *image.shape[3:]),
            (b * self.kernel[0], self.kernel[1], *flat, *self.kernel[2:]),
            cotangent.transpose(0, 1).reshape(n, b * cotangent.shape[2], *flat, *cotangent.shape[3:]),
            flat + self.stride,
            (0,) * len(flat) + self.padding,
            flat + self.dilation,
            b * self.groups,
        )
        return grads.view(b, *self.kernel)

    def in_groups(self, size: int) -> Iterator[Term]:
        t, h = math.prod(self.cotangent.shape[3:]) * self.cotangent.shape[1] * size, self.kernel[0] // self.groups
        d = math.prod(self.kernel[1:])
        if self.strategy not in BUILDS and t * (d + h) < d * h:
            yield from self.outer().in_groups(size)
            return
        image, cotangent = (x.unflatten(0, (-1, size)).flatten(1, 2) for x in (self.image, self.cotangent))
        strategy: Strategy = self.strategy if self.strategy in BUILDS else "build"
        yield replace(self, image=image, cotangent=cotangent, strategy=strategy)

    def masked(self, keep: Tensor) -> Convolution:
        return replace(self, image=masked(self.image, keep), cotangent=masked(self.cotangent, keep))

    def times(self, c: Tensor) -> Convolution:
        return replace(self, image=tree.wide(self.image), cotangent=scaled(tree.wide(self.cotangent), c))

    def built(self) -> Term:
        return self._parts() if _builds(self, self.kernel, self.image, self.cotangent) else self

    def weighted_sum(self, weights: Tensor) -> Tensor:
        image, cotangent = self.image.flatten(0, 1), scaled(self.cotangent, weights).flatten(0, 1)
        gradient = _WEIGHT_GRADIENTS[len(self.stride)]
        weight: Tensor = gradient(image, self.kernel, cotangent, self.stride, self.padding, self.dilation, self.groups)
        return weight

    def dot(self, direction: Tensor) -> Tensor:
        image, cotangent = self.image.flatten(0, 1), self.cotangent
        convolution = _CONVOLUTIONS[len(self.stride)]
        image, direction = common(image, direction)
        outputs = convolution(image, direction, None, self.stride, self.padding, self.dilation, self.groups)
        return row_sums(outputs.view(cotangent.shape) * cotangent)

    def square_norms(self, by: Careful = CAREFUL) -> Tensor:
        if self.strategy in BUILDS:
            return super().square_norms(by)
        if self.strategy == "outer product" or not by_pixels(self.kernel[2:], self.stride):
            return self.outer().square_norms(by)
        (image, c), (cotangent, d) = by.scaled(self.image), by.scaled(self.cotangent)
        cotangents = self._grouped(cotangent).flatten(2, -2)
        products = replace(self, image=image)._patch_products()
        sums = row_sums(products * (cotangents @ cotangents.transpose(-2, -1)).view(products.shape))
        return by.unscaled(sums, c * d, image, cotangent)

    def _patch_products(self) -> Tensor:
        """Inner products of all pairs of patches, (B, G, N, *positions, N, *positions): those of pixels, summed."""
        images, space = self.image.shape[1], self.image.shape[3:]
        pixels = tree.wide(self._grouped(self.image).flatten(2, -2))
        products = (pixels @ pixels.transpose(-2, -1)).unflatten(-1, (images, *space)).unflatten(2, (images, *space))
        if any(self.padding):
            sides = [p for p in reversed(self.padding) for _ in range(2)]
            products = stored(F.pad(products, [*sides, 0, 0, *sides]))
        total: Tensor | float = 0.0
        for offsets in itertools.product(*map(range, self.kernel[2:])):
            part = products
            for axis, offset in enumerate(offsets):
                part = self._along(self._along(part, 3 + axis, axis, offset), 4 + len(space) + axis, axis, offset)
            total = total + part
        return total  # type: ignore[return-value]

    def reach(self, by: Careful = CAREFUL) -> Tensor | None:
        if math.prod(self.cotangent.shape[3:]) * self.cotangent.shape[1] == 1:
            return None
        (image, c), (cotangent, d) = by.scaled(self.image), by.scaled(self.cotangent)
        squares = image.square().sum(2, keepdim=True).flatten(0, 1)  # of all channels, so of each group
        ones = squares.new_ones(1, 1, *self.kernel[2:])
        convolution = _CONVOLUTIONS[len(self.stride)]
        a: Tensor = convolution(squares, ones, None, self.stride, self.padding, self.dilation)
        g = cotangent.square().sum(2).flatten(0, 1)
        sums = row_sums((a.squeeze(1).clamp(min=0).sqrt() * g.sqrt()).view(len(self.image), -1))
        return by.given(sums.double() / (c * d), root=True)

    def gram(self, other: Term) -> Tensor:
        if self.strategy in BUILDS or not isinstance(other, Convolution):
            return super().gram(other)
        return self.outer().gram(other.outer())

    def second_moment(self) -> Tensor:
        return self.outer().second_moment() if self.strategy == "outer product" else super().second_moment()

    def kronecker(self, ones: Tensor | None = None) -> Kronecker:
        return self.outer().kronecker(ones)

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        if self.groups > 1:
            return super().project(left, right)
        kernels = right.view(-1, *self.kernel[1:])  # patches need not be formed: an ordinary convolution projects them
        image = tree.wide(self.image).flatten(0, 1)
        a: Tensor = _CONVOLUTIONS[len(self.stride)](image, kernels, None, self.stride, self.padding, self.dilation)
        a = a.unflatten(0, self.image.shape[:2]).movedim(2, -1).flatten(1, -2)  # (B, N positions, d)
        g = tree.wide(self.cotangent).movedim(2, -1).flatten(1, -2) @ left.T
        return g.transpose(-2, -1) @ a

    def pair(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
        outer = self._at_one_position()
        if outer is None:
            return None
        channels_last = right.view(len(right), *self.kernel[1:]).movedim(1, -1).flatten(1)  # as patches are stored
        return outer.pair(left, channels_last)

    def sides(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        outer = self._at_one_position()
        if outer is None:
            return super().sides(weights)
        left, right = outer.sides(weights)
        place = torch.arange(len(right), device=right.device).view(*self.kernel[2:], self.kernel[1]).movedim(-1, 0)
        return left, right[place.flatten()][:, place.flatten()]

    def _at_one_position(self) -> Outer | None:
        """The same as a linear map, where it is one from one position: the kernel covers the image."""
        if self.groups > 1 or math.prod(self.cotangent.shape[3:]) * self.cotangent.shape[1] > 1:
            return None
        outer = self.outer()
        return replace(outer, layout=layout((self.kernel[0], math.prod(self.kernel[1:]))))

    def outer(self) -> Outer:
        """The same as a linear map of patches: T is N times the positions, D is kernel times channels."""
        b, g, h = len(self.image), self.groups, self.kernel[0] // self.groups
        kernel, space = self.kernel[2:], len(self.stride)
        image = self._padded_channels_last()
        if image.shape[2:-1] == kernel:  # the kernel covers the image
            a = image.unflatten(-1, (g, -1)).movedim(-2, 1)
        else:
            patches, image = [], stored(image)
            for offsets in itertools.product(*map(range, kernel)):
                part = image
                for axis in range(space):
                    part = self._along(part, 2 + axis, axis, offsets[axis])
                patches.append(part)
            if image.shape[-1] == 1:  # positions next to each other in memory, for there are more of them
                a = torch.stack([patch.squeeze(-1) for patch in patches], 2).movedim(2, -1)[:, None, ..., None]
            else:
                a = torch.stack(patches, -2).unflatten(-1, (g, -1)).movedim(-2, 1)  # (B, G, N, *positions, K, C / G)
        cotangent = self._grouped(self.cotangent)
        return Outer(
            a.reshape(b, g, -1, math.prod(self.kernel[1:])),
            cotangent.reshape(b, g, -1, h),
            kernel_layout(self.kernel, g),
            self.strategy,
        )

    def _grouped(self, x: Tensor) -> Tensor:
        """(B, N, channels, *space) as (B, G, N, *space, channels / G)."""
        grouped: Tensor = x.movedim(2, -1).unflatten(-1, (self.groups, x.shape[2] // self.groups)).movedim(-2, 1)
        return grouped

    def _padded_channels_last(self) -> Tensor:
        """The image with its padding, (B, N, *space, channels)."""
        image = self.image.movedim(2, -1)
        if not any(self.padding):
            return image
        return F.pad(image, [0, 0, *[p for p in reversed(self.padding) for _ in range(2)]])

    def _along(self, x: Tensor, at: int, axis: int, offset: int) -> Tensor:
        """The numbers that one offset of the kernel meets along an axis of space, which is an axis of `x`."""
        start = offset * self.dilation[axis]
        stop = start + self.stride[axis] * (self.cotangent.shape[3 + axis] - 1) + 1
        return x[(slice(None),) * at + (slice(start, stop, self.stride[axis]),)]


def by_pixels(kernel: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether inner products of patches are summed from those of pixels: of these there are fewer than pairs of places.

    A stride of s leaves out all but one of s^2 pairs of pixels along each axis, of which the kernel meets K.
    """
    return math.prod(stride) ** 2 < math.prod(kernel)


@tree.register
@dataclass(frozen=True)
class Viewed(Term):
    """A term of a view of the parameter."""

    term: Term
    view: View = tree.static()

    def factors(self) -> tuple[Tensor, ...]:
        return self.term.factors()

    def shape(self) -> tuple[int, ...]:
        return self.view.before

    def examples(self, rows: slice | Tensor) -> Viewed:
        return Viewed(self.term.examples(rows), self.view)

    def of_groups(self, members: Members) -> Iterator[tuple[Tensor, Term]]:
        for groups, term in self.term.of_groups(members):
            yield groups, Viewed(term, self.view)

    def grads(self) -> Tensor:
        return self.view.backward(self.term.grads())

    def masked(self, keep: Tensor) -> Viewed:
        return Viewed(self.term.masked(keep), self.view)

    def built(self) -> Viewed:
        return Viewed(self.term.built(), self.view)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.view.backward(self.term.weighted_sum(weights))

    def dot(self, direction: Tensor) -> Tensor:
        return self.term.dot(self.view.forward(direction))

    def square_norms(self, by: Careful = CAREFUL) -> Tensor:
        return self.term.square_norms(by)

    def reach(self, by: Careful = CAREFUL) -> Tensor | None:
        return self.term.reach(by)

    def gram(self, other: Term) -> Tensor:
        if isinstance(other, Viewed) and other.view == self.view:
            return self.term.gram(other.term)
        return super().gram(other)

    def second_moment(self) -> Tensor:
        return self.view.backward(self.term.second_moment())

    def kronecker(self, ones: Tensor | None = None) -> Kronecker | None:
        pair = self.term.kronecker(ones)
        return None if pair is None else replace(pair, views=(self.view, *pair.views))

    def project(self, left: Tensor, right: Tensor) -> Tensor:
        seen = self._seen(right)
        return super().project(left, right) if seen is None else self.term.project(left, seen)

    def pair(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
        seen = self._seen(right)
        return None if seen is None else self.term.pair(left, seen)

    def sides(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        columns = math.prod(self.view.before[1:])
        numbers = torch.arange(columns, device=weights.device)[None]
        seen = self._seen(numbers)
        if seen is None:
            return super().sides(weights)
        left, right = self.term.sides(weights)
        place = torch.empty_like(seen[0]).scatter(0, seen[0], numbers[0])
        return left, right[place][:, place]

    def _seen(self, rows: Tensor) -> Tensor | None:
        """What is shaped as rows of the parameter, (d, D), as rows of the view; none where the view moves rows."""
        before, after = self.view.before, self.view.after
        if self.view.order[:1] != (0,) or before[:1] != after[:1]:
            return None
        axes = self.view.order[1:]
        return rows.view(len(rows), *before[1:]).permute(0, *axes).reshape(len(rows), -1)


def joined(parts: list[Tensor]) -> Tensor:
    """(B, …), of parts with B_k rows."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """⟨x_i, y_j⟩: (B, B')."""
    return tree.wide(x).reshape(len(x), -1) @ tree.wide(y).reshape(len(y), -1).T


def scaled(x: Tensor, weights: Tensor) -> Tensor:
    """Each row of (B, …) times its weight."""
    return x * weights.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def _builds(term: Outer | Convolution, shape: tuple[int, ...], a: Tensor, g: Tensor) -> bool:
    """Whether inner products build the sample gradients, and these are no larger than the factors."""
    return term.strategy in BUILDS and math.prod(shape) <= a[0].numel() + g[0].numel()


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Σ_i c_i x_i of (B, …): one pass over the numbers as they are stored, where the compiler does not make it one."""
    order = sorted(range(1, values.dim()), key=values.stride, reverse=True)
    stored = values.permute(0, *order)
    if torch.compiler.is_compiling() or values.device.type != "cpu" or not stored.is_contiguous():
        return scaled(values, weights).sum(0)
    total = (weights.to(values.dtype) @ stored.reshape(len(values), -1)).view(stored.shape[1:])
    return total.permute([order.index(axis) for axis in range(1, values.dim())])


def common(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one precision, float32 or wider."""
    dtype = torch.promote_types(tree.wide(a).dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def merged(x: Tensor) -> Tensor:
    """(B, G, T, D) as (G, B T, D)."""
    return x.transpose(0, 1).flatten(1, 2)


def product(x: Tensor, y: Tensor) -> Tensor:
    """Σ_{b, t} x yᵀ, (G, H, D), of (B, G, T, H) and (B, G, T, D)."""
    if x.shape[1] == 1:
        return sum_of_outer(x.flatten(0, 2), y.flatten(0, 2))[None]
    return merged(x).transpose(-2, -1) @ merged(y)


def pairs(x: Tensor, y: Tensor) -> Tensor:
    """All inner products (G, B T, B' T') of (B, G, T, D) and (B', G, T', D)."""
    return tree.wide(merged(x)) @ tree.wide(merged(y)).transpose(-2, -1)
