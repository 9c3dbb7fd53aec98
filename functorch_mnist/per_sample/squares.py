"""Sums of squares in a range beyond float32's.

Gradients of confident examples have entries of 1e-22 and less, whose squares float32 cannot hold, and sums that
overflow are infinite though the norm is not. Two ways to take them, equal in the last digit wherever both are right:

    Plain      in float32, at a scale of 2^80, by ops that take no longer than without; and it remembers the sums. Such
               a sum is right if it is between 2^-90 and 2^126, or zero: for norms from 3e-26 to 8e6. A zero stands for
               numbers below 5e-35
    Careful    for all that float32 holds: compiled, in float64, which the compiler fuses; else the numbers are scaled
               by a power of two, which the largest tells

Eager on a CPU, sums are plain and are looked at; those that may be wrong are taken again. A program that is recorded
does not look: it returns what there is to look at. Elsewhere sums are careful. Inner products of factors are plain
without a scale: a zero of them is looked into, but for a recorded program, where a bias's gradient tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .. import native, tree

_SCALE = 2.0**80
"""Of plain sums: of numbers times 2^40."""
_LOW, _HIGH = 2.0**-90, 2.0**126
"""Of such sums: the rounding of 2^35 squares below float32's range is 24 binary digits below the one."""


class Scalable(Protocol):
    """What sums of squares know of a term."""

    def factors(self) -> tuple[Tensor, ...]: ...

    def times(self, c: Tensor) -> Any: ...


T = TypeVar("T", bound=Scalable)


class Careful:
    """Sums of squares of all that float32 holds."""

    def squares(self, x: Tensor, lead: int = 1) -> Tensor:
        """The sum of squares over all but the leading axes, in float64."""
        if x.dtype == torch.float64 or torch.compiler.is_compiling():
            return row_sums(x.double().square(), lead)
        x = tree.wide(x)
        c = power(x, lead)
        return row_sums((x * _spread(c, x)).square(), lead).double() / c.double().square()

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, …), float32 or wider, times powers of two c (B,), so that squares are in range; and c in float64."""
        x = tree.wide(x)
        if x.dtype == torch.float64:
            return x, x.new_ones(len(x))
        c = power(x)
        return x * _spread(c, x), c.double()

    def balanced(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors a (B, G, T, D) and g (B, G, T, H), each position at a scale of its own, whose products are c times.

        So that squares of both are in range, whichever of the two is a cotangent; and c (B,) in float64.
        """
        a, g = tree.wide(a), tree.wide(g)
        if torch.float64 in (a.dtype, g.dtype):
            return a, g, a.new_ones(len(a), dtype=torch.float64)
        alpha = power(a, 3)
        c = power(_largest(g, 3).double() / alpha.double(), steps=(40,) * 6)
        gamma = (_spread(c, alpha) / alpha.double()).clamp(max=2.0**126).to(g.dtype)
        return a * alpha[..., None], g * gamma[..., None], c

    def pairs(self, a: Tensor, g: Tensor, lead: int) -> tuple[Tensor, Tensor]:
        """`squares` of two factors, whose products are those of outer products."""
        return self.squares(a, lead), self.squares(g, lead)

    def unscaled(self, sums: Tensor, c: Tensor, *factors: Tensor) -> Tensor:  # noqa: ARG002
        """Sums of squares (B,) of products of these factors (B, …) times c, without the scale, in float64."""
        return sums.double() / c.square()

    def whole(self, sums: Tensor) -> Tensor:
        """What comes of `pairs`, as it is."""
        return sums

    def given(self, sums: Tensor, root: bool = False) -> Tensor:  # noqa: ARG002
        """Sums of squares (B,), or roots of such, that were taken otherwise."""
        return sums

    def crossed(self, products: Tensor, c: Tensor) -> Tensor:
        """Twice the inner products (B,) of what `ready` gave, without the scale."""
        return 2 * products.double() / c

    def ready(self, term: T, squares: Tensor) -> tuple[T, Tensor]:
        """A term times powers of two c (B,), so that its inner products are in range; and c in float64.

        Args:
            term: a term.
            squares: its squared norms (B,).
        """
        if torch.float64 in [x.dtype for x in term.factors()]:
            return term, torch.ones_like(squares)
        c = power(squares.sqrt().float())
        return term.times(c), c.double()


class Plain(Careful):
    """Sums of squares that are to be looked at: in float32, at a scale of 2^80. Not for float64."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        """What is to be in range."""
        self.products: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        """Sums of inner products, and the factors: a zero of them may stand for what is not."""

    def hides(self) -> bool:
        """Whether a zero does, so far as the program may look."""
        return any([_hides(sums, factors) for sums, factors in self.products])

    def squares(self, x: Tensor, lead: int = 1) -> Tensor:
        x = tree.wide(x)
        sums = row_sums(torch.addcmul(x.new_zeros(()), x, x, value=_SCALE), lead)
        self.seen.append(sums)
        return sums

    def pairs(self, a: Tensor, g: Tensor, lead: int) -> tuple[Tensor, Tensor]:
        ordinary = row_sums(tree.wide(a).square(), lead)
        self.seen.append(ordinary)
        return ordinary, self.squares(g, lead)

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tree.wide(x), x.new_ones(())

    def balanced(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tree.wide(a), *self.scaled(g)

    def unscaled(self, sums: Tensor, c: Tensor, *factors: Tensor) -> Tensor:  # noqa: ARG002 (it is 1)
        self.seen.append(sums.abs() * 2.0**24)  # what cancels may be below zero
        self.products.append((sums, factors))
        return self.given(sums)

    def whole(self, sums: Tensor) -> Tensor:
        self.seen.append(sums)
        return sums

    def given(self, sums: Tensor, root: bool = False) -> Tensor:
        found = (sums * (_SCALE**0.5 if root else _SCALE)).float()
        self.seen.append(found.abs())
        return found

    def crossed(self, products: Tensor, c: Tensor) -> Tensor:  # noqa: ARG002 (it is 1)
        return products * (2 * _SCALE)

    def ready(self, term: T, squares: Tensor) -> tuple[T, Tensor]:
        self.seen.append(squares * (2.0**20 / _SCALE))  # two norms of 2^-55 have an inner product
        return term, torch.ones_like(squares)


CAREFUL = Careful()


def power(x: Tensor, lead: int = 1, steps: tuple[int, ...] = (40, 40, 40)) -> Tensor:
    """Powers of two that take the largest of (B, …) to between 2^-20 and 2^20: (B,), or by more leading axes.

    Each step takes what is below 2^(-step / 2) up by 2^step, or what is above 2^(step / 2) down. Zeros stay.
    """
    largest = _largest(tree.wide(x), lead)
    c = torch.ones_like(largest)
    for step in steps:
        up = (largest < 2.0 ** (-step / 2)) & (largest > 0)
        factor = torch.where(up, 2.0**step, torch.where(largest > 2.0 ** (step / 2), 2.0**-step, 1.0)).to(c.dtype)
        c, largest = c * factor, largest * factor
    return c


def _largest(x: Tensor, lead: int = 1) -> Tensor:
    x = x.detach()
    return x.abs().amax(list(range(lead, x.dim()))) if x.dim() > lead and x.numel() else row_sums(x, lead).abs()


def _hides(sums: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether a sum is zero and its factors are not."""
    if not _any(sums == 0):
        return False
    alive = [_largest(x) > 0 for x in factors]
    return _any(torch.stack([*alive, sums == 0]).all(0))


def _any(x: Tensor) -> bool:
    known = native.numbers(x)
    return known is not None and bool(known.any())


def row_sums(x: Tensor, lead: int = 1) -> Tensor:
    """The sum over all but the leading axes. Axes are named, not flattened: the compiler then sums in stored order."""
    return x.sum(list(range(lead, x.dim()))) if x.dim() > lead else x


def _spread(c: Tensor, x: Tensor) -> Tensor:
    return c.view(*c.shape, *[1] * (x.dim() - c.dim()))


def may_be_plain(like: Tensor) -> bool:
    """Whether sums can be looked at, now or when a recorded program ends; `like` is a tensor of the same device."""
    if torch.compiler.is_compiling() or like.device.type != "cpu":
        return False
    if _RECORDING:
        return True
    return native.numbers(like) is not None and torch._C._len_torch_dispatch_stack() == 0


def are_right(ways: Sequence[Plain]) -> list[bool]:
    """Whether the sums of each are right; in a program that is recorded, they are taken to be."""
    if _RECORDING:
        _RECORDING[-1].extend([x for way in ways for x in way.seen])
        return [True] * len(ways)
    seen = [x for way in ways for x in way.seen]
    if not seen or (in_range(ends(seen)) and not any([way.hides() for way in ways])):
        return [True] * len(ways)
    return [not way.seen or (in_range(ends(way.seen)) and not way.hides()) for way in ways]


def ends(seen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The least, but for zeros, and the largest of all sums: 0-d."""
    every = torch.cat([x.reshape(-1) for x in seen])
    least, most = torch.where(every == 0, 1.0, every).aminmax()
    return least, most


def in_range(ends: tuple[Tensor, Tensor]) -> bool:
    """Whether sums with these ends are right."""
    least, most = (native.numbers(x) for x in ends)
    if least is None or most is None:
        return False
    return bool(least.amin() >= _LOW and most.amax() <= _HIGH) if least.dim() else are_in_range(least, most)


def are_in_range(least: Tensor, most: Tensor) -> bool:
    """The same of plain 0-d tensors."""
    return float(least) >= _LOW and float(most) <= _HIGH


def plain_total(found: Sequence[Tensor]) -> Tensor:
    """Plain sums (B,) without their scale: (L, B) in float64."""
    return torch.stack(list(found)).double() * (1 / _SCALE)


_RECORDING: list[list[Tensor]] = []


@contextmanager
def looked_at_later() -> Iterator[list[Tensor]]:
    """Within, sums are plain and not looked at: what there is to look at is in the list."""
    _RECORDING.append([])
    try:
        yield _RECORDING[-1]
    finally:
        _RECORDING.pop()
