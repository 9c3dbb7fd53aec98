"""The backward pass of a loss over a batch or its chunks, and what is made of its factored gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import arguments, tree
from .. import batch as batches
from ..tree import Tree
from .algebra import Factored
from .capture import LossFn, Strayed, Survey, biases, factor, survey
from .planning import Plan, strategies
from .terms import Strategy

Finish = Callable[..., Tree]
"""`finish(factored, *more)`: what is made of the factored gradients, a tree of tensors."""


class Loss(NamedTuple):
    """A loss, and how its sample gradients are taken."""

    loss_fn: LossFn
    plan: Plan | None = None
    has_aux: bool = False


class Ways(NamedTuple):
    """What is found out about a loss before its backward pass."""

    survey: Survey
    strategies: Sequence[Strategy | None]
    """Of each parameter."""


def ways(loss: Loss, params: Tree, batch: Sequence[Tensor], mask: Tensor | None, rows: int = 1) -> Ways:
    """What a loss does with its parameters for the first examples of a batch, and the strategies that follow."""
    check_params(params)
    first = batches.blanked([x[:rows] for x in batch], None if mask is None else mask[:rows])
    found = survey(loss.loss_fn, params, first, has_aux=loss.has_aux, rows=rows)
    return Ways(found, strategies(params, found, loss.plan))


def passed(loss: Loss, params: Tree, batch: Sequence[Tensor], mask: Tensor | None, found: Ways) -> Factored:
    """The factored gradients of a batch.

    Raises:
        Strayed: the loss runs other ops than were found.
    """
    batch = batches.blanked(batch, mask)
    losses, terms, aux = factor(loss.loss_fn, params, batch, *found, has_aux=loss.has_aux)
    result = Factored(losses, terms, params, aux, biases(found.survey))
    return result if mask is None else result.masked(mask)


def itself(factored: Factored) -> Factored:
    return factored


class Pass:
    """The backward pass of a loss over chunk after chunk, for which what it does is found out once."""

    def __init__(self, loss: Loss, params: Tree, found: Ways | None = None) -> None:
        self.loss, self.params, self.found = loss, params, found

    def look(self, batch: Sequence[Tensor], mask: Tensor | None) -> Ways:
        """What is found out before the first chunk."""
        self.found = ways(self.loss, self.params, batch, mask)
        return self.found

    def __call__(self, batch: Sequence[Tensor], mask: Tensor | None, finish: Finish = itself, *more: Tree) -> Any:
        """What `finish` makes of the factored gradients of a chunk."""
        before = self.found or self.look(batch, mask)
        try:
            found = passed(self.loss, self.params, batch, mask, before)
        except Strayed:  # a module branches on its batch, as on whether there is any padding
            again = ways(self.loss, self.params, batch, mask, len(batch[0]))
            found = passed(self.loss, self.params, batch, mask, again)
        return finish(found, *more)


def check_params(params: Tree) -> None:
    """Raises TypeError for parameters that are not float tensors, ValueError where two have one path."""
    arguments.check_params("per_sample", params)
    paths = tree.paths(params)
    if len(set(paths)) < len(paths):
        raise ValueError(f"per_sample: parameters must have different paths. Found {paths}.")
