"""Forms: how a parameter's sample gradients follow from what a rule saved and from the cotangent of its op's output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout
from .lookups import Lookup
from .terms import Convolution, Dense, Outer, Strategy, Term, by_pixels


class Sizes(NamedTuple):
    """What the cost of one example's term depends on."""

    groups: int
    positions: int
    inputs: int
    outputs: int


class Cost(NamedTuple):
    """What the inner product of one example's gradient with itself costs."""

    memory: int
    """Numbers stored besides the factors."""
    arithmetic: int
    """Multiplications and additions."""


class Form(Protocol):
    """How a parameter's sample gradients follow from what a rule saved and from the cotangent of the op's output."""

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:
        """From the shapes of one example."""
        ...

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        """Of each strategy that applies."""
        ...

    def factors(self, sizes: Sizes) -> int:
        """How many numbers the factors are."""
        ...

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Term:
        """From the tensors of B examples."""
        ...


@dataclass(frozen=True)
class MatrixForm:
    """`y[positions, outputs] = Σ_inputs W[outputs, inputs] a[positions, inputs]`, for each group."""

    layout: Layout
    order: tuple[int, ...]
    """The axes of the op's output: those of groups, of positions, of outputs."""

    @property
    def biased(self) -> tuple[int, int]:
        """The numbers of groups and of outputs, for each of which the op can add a bias."""
        return self.layout.sizes[:2]

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:  # noqa: ARG002 (the layout knows)
        groups, outputs, inputs = self.layout.sizes
        return Sizes(groups, saved[1], inputs, outputs)

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        return matrix_costs(sizes, patches=0)

    def factors(self, sizes: Sizes) -> int:
        return sizes.groups * sizes.positions * (sizes.inputs + sizes.outputs)

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Outer:
        groups, outputs, _ = self.layout.sizes
        saved = saved.to(cotangent.dtype)  # autocast runs the op in another precision than its input's
        g = cotangent.permute(0, *[axis + 1 for axis in self.order])
        return Outer(saved, g.reshape(len(saved), groups, saved.shape[2], outputs), self.layout, strategy)


@dataclass(frozen=True)
class ConvolutionForm:
    """A convolution; `swapped` for a transposed one."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    swapped: bool

    @property
    def biased(self) -> tuple[int, int]:
        """The numbers of groups and of outputs, for each of which the op can add a bias; none for a transposed one."""
        return (0, 0) if self.swapped else (self.groups, self.shape[0] // self.groups)

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:
        positions = saved if self.swapped else output
        space = len(self.stride)
        count = math.prod(positions[-space:]) * saved[0]
        return Sizes(self.groups, count, math.prod(self.shape[1:]), self.shape[0] // self.groups)

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        groups, t, d, h = sizes
        costs = matrix_costs(sizes, patches=groups * t * d)
        if t > 1 and by_pixels(self.shape[2:], self.stride):
            pairs, channels = (t * math.prod(self.stride)) ** 2, self.shape[1]
            shifted = groups * t * t * math.prod(self.shape[2:])
            costs["gram"] = Cost(
                groups * (2 * pairs + 2 * t * t), 2 * groups * (pairs * channels + t * t * h) + shifted
            )
        copied = groups * t * (self.shape[1] * math.prod(self.stride) + h)
        costs["unfold"] = costs["build"]._replace(memory=costs["build"].memory + groups * t * d)
        costs["grouped convolution"] = costs["build"]._replace(memory=costs["build"].memory + copied)
        return costs

    def factors(self, sizes: Sizes) -> int:
        return sizes.groups * sizes.positions * (sizes.inputs + sizes.outputs)

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Convolution:
        saved = saved.to(cotangent.dtype)
        cotangent = cotangent.reshape(*saved.shape[:2], *cotangent.shape[-len(self.stride) - 1 :])
        image, cotangent = (cotangent, saved) if self.swapped else (saved, cotangent)
        padding = self.padding
        if self.swapped:  # output_padding adds places at the end that the kernel does not reach from any position
            reach = [
                s * (n - 1) + d * (k - 1) + 1
                for s, n, d, k in zip(self.stride, saved.shape[3:], self.dilation, self.shape[2:], strict=True)
            ]
            sides = [(p, r - p - n) for p, r, n in zip(padding, reach, image.shape[3:], strict=True)]
            image = F.pad(image, [side for pair in reversed(sides) for side in pair])
            padding = (0,) * len(padding)
        return Convolution(image, cotangent, self.shape, self.stride, padding, self.dilation, self.groups, strategy)


@dataclass(frozen=True)
class LookupForm:
    """Rows of a table (V, H)."""

    shape: tuple[int, ...]
    padding_idx: int | None

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:  # noqa: ARG002 (the table knows)
        return Sizes(1, saved[0], *self.shape)

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        _, t, v, h = sizes
        return {"gram": Cost(2 * t * h, 3 * t * h), "build": Cost(v * h, t * h + 2 * v * h)}

    def factors(self, sizes: Sizes) -> int:
        return sizes.positions * sizes.outputs

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Lookup:
        live = torch.ones_like(saved, dtype=torch.bool) if self.padding_idx is None else saved != self.padding_idx
        g = cotangent.reshape(*saved.shape, self.shape[1])
        g = torch.where(live[..., None], g, torch.zeros((), dtype=g.dtype, device=g.device))
        return Lookup(saved, g, live, self.shape, strategy)


@dataclass(frozen=True)
class ShiftForm:
    """`y = … + factor · w`: the sample gradient is the cotangent's sum where w is repeated."""

    shape: tuple[int, ...]
    """Of the parameter."""
    broadcast: tuple[int, ...]
    """The same with axes of 1, as it is broadcast to the output."""
    factor: float = 1

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:  # noqa: ARG002 (nothing is saved)
        return _sum_sizes(self.shape, output)

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        return {"sum": Cost(sizes.outputs, sizes.positions * sizes.outputs)}

    def factors(self, sizes: Sizes) -> int:
        return sizes.outputs

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Dense:  # noqa: ARG002
        sums = _summed(cotangent, self.broadcast).reshape(len(cotangent), *self.shape)
        return Dense(sums if self.factor == 1 else sums * self.factor)


@dataclass(frozen=True)
class ScaleForm:
    """`y = … + w ∘ x`: the sample gradient is the sum of `x ∘ g` where w is repeated."""

    shape: tuple[int, ...]
    broadcast: tuple[int, ...]

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:  # noqa: ARG002
        return _sum_sizes(self.shape, output)

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        return {"sum": Cost(sizes.outputs, 2 * sizes.positions * sizes.outputs)}

    def factors(self, sizes: Sizes) -> int:
        return sizes.outputs

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Dense:  # noqa: ARG002
        missing = cotangent.dim() - saved.dim()
        products = saved.view(len(saved), *[1] * missing, *saved.shape[1:]) * cotangent
        return Dense(_summed(products, self.broadcast).reshape(len(cotangent), *self.shape))


def _sum_sizes(shape: tuple[int, ...], output: torch.Size) -> Sizes:
    outputs = math.prod(shape)
    return Sizes(1, math.prod(output) // max(outputs, 1), 1, outputs)


def _summed(values: Tensor, broadcast: tuple[int, ...]) -> Tensor:
    """(B, …) summed over the axes along which what is broadcast to them is repeated."""
    full = (1,) * (values.dim() - 1 - len(broadcast)) + broadcast
    repeated = [i + 1 for i, size in enumerate(full) if size == 1]
    return values.sum(repeated) if repeated else values


def matrix_costs(sizes: Sizes, patches: int) -> dict[Strategy, Cost]:
    """Of G matrices (H, D) at T positions, where the (T, D) inputs must first be stored for all but `build`."""
    g, t, d, h = sizes
    costs: dict[Strategy, Cost] = {
        "gram": Cost(2 * g * t * t + patches, 2 * g * t * t * (d + h)),
        "build": Cost(g * h * d, 2 * g * t * h * d),
    }
    return {"outer product": Cost(0 if t * d == patches else patches, 2 * g * (d + h)), **costs} if t == 1 else costs
