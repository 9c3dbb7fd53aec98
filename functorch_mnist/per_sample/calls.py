"""Ops without a rule: the sample gradients of a weight by the vector-Jacobian product of the op itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vmap

from .. import tree
from ..batch import masked
from ..ops import nested
from .forms import Cost, Sizes
from .terms import Strategy, Term, scaled
from .weights import Weight, pullback, pushed_forward


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among an op's arguments."""

    kind: Literal["weight", "other", "saved"]
    """The weight itself, another weight, or a tensor of the example."""
    number: int = 0


@dataclass(frozen=True, eq=False)
class CallForm:
    """Any op that is differentiable by the weight."""

    shape: tuple[int, ...]
    others: tuple[Weight, ...]
    """Other weights that the op gets."""
    op: Callable[..., Any]
    args: Any
    """With a slot in the place of each tensor."""
    kwargs: Any

    def sizes(self, saved: Any, output: Any) -> Sizes:  # noqa: ARG002 (the weight's shape tells)
        return Sizes(1, 1, 1, torch.Size(self.shape).numel())

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        return {"build": Cost(sizes.outputs, 2 * sizes.outputs)}

    def factors(self, sizes: Sizes) -> int:
        return sizes.outputs

    def term(self, saved: Any, cotangent: Any, strategy: Strategy) -> Term:  # noqa: ARG002 (there is one)
        weight, others, examples = saved
        return Called(examples, others, weight, cotangent, self)

    def outputs(self, weight: Tensor, others: tuple[Tensor, ...], examples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The float outputs of the op, for one example."""

        def filled(value: Any) -> Any:
            if not isinstance(value, Slot):
                return value
            return {"weight": (weight,), "other": others, "saved": examples}[value.kind][value.number]

        return float_outputs(self.op(*nested(filled, self.args), **nested(filled, self.kwargs)))


def float_outputs(out: Any) -> tuple[Tensor, ...]:
    """Those outputs of an op through which a gradient can flow."""
    outputs = out if isinstance(out, (list, tuple)) else (out,)
    return tuple([x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()])


@tree.register
@dataclass(frozen=True)
class Called(Term):
    """Sample gradients by an op's own vector-Jacobian product."""

    inputs: tuple[Tensor, ...]
    """(B, …): what the op got of each example."""
    others: tuple[Tensor, ...]
    """Other weights that it got."""
    weight: Tensor
    cotangents: tuple[Tensor, ...]
    """(B, …): of its float outputs."""
    form: CallForm = tree.static()

    def factors(self) -> tuple[Tensor, ...]:
        return self.inputs + self.cotangents

    def shape(self) -> tuple[int, ...]:
        return self.form.shape

    def examples(self, rows: slice | Tensor) -> Called:
        examples, cotangents = (tuple([x[rows] for x in xs]) for xs in (self.inputs, self.cotangents))
        return replace(self, inputs=examples, cotangents=cotangents)

    def grads(self) -> Tensor:
        def one(examples: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> Tensor:
            _, pull = pullback(lambda weight: self.form.outputs(weight, self.others, examples), self.weight)
            gradient: Tensor = pull(cotangents)[0]
            return gradient

        return vmap(one)(self.inputs, self.cotangents)

    def masked(self, keep: Tensor) -> Called:
        examples, cotangents = (tuple([masked(x, keep) for x in xs]) for xs in (self.inputs, self.cotangents))
        return replace(self, inputs=examples, cotangents=cotangents)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        _, pull = pullback(self._outputs, self.weight)
        gradient: Tensor = pull(tuple([scaled(g, weights) for g in self.cotangents]))[0]
        return gradient

    def dot(self, direction: Tensor) -> Tensor:
        outputs = pushed_forward(self._outputs, self.weight, direction)
        products = [
            (tree.wide(y) * tree.wide(g)).reshape(len(y), -1).sum(1)
            for y, g in zip(outputs, self.cotangents, strict=True)
        ]
        return torch.stack(products).sum(0)

    def _outputs(self, weight: Tensor) -> tuple[Tensor, ...]:
        """(B, …)."""
        outputs: tuple[Tensor, ...] = vmap(lambda *xs: self.form.outputs(weight, self.others, xs))(*self.inputs)
        return outputs
