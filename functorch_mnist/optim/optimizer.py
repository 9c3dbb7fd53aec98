"""What an optimizer is, and what each one asks of its trees."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..tree import Tree


class Optimizer(NamedTuple):
    """A pair of pure functions over any pytree of parameters."""

    init: Callable[[Tree], Tree]
    """`init(params) -> state`."""
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    """`update(params, state, grads) -> (params, state)`; `grads` is shaped as `params`."""


def no_updates(params: Tree) -> Tensor:
    """The count of updates at the start: a 0-d int64 zero on the device of the parameters."""
    values = tree.leaves(params)
    return torch.zeros((), dtype=torch.int64, device=values[0].device if values else None)


def check_params(where: str, params: Tree) -> None:
    """Raises TypeError for a leaf that is not a float tensor."""
    for path, leaf in zip(tree.paths(params), tree.leaves(params), strict=True):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise TypeError(f"{where}: every parameter must be a float tensor. Found {path}: {leaf!r:.80}.")


def check_grads(where: str, params: Tree, grads: Tree) -> None:
    """Raises ValueError for gradients without the structure and shapes of the parameters."""
    if all(tree.leaves(tree.map(lambda w, g: w.shape == g.shape, params, grads))):
        return
    for path, w, g in zip(tree.paths(params), tree.leaves(params), tree.leaves(grads), strict=True):
        if w.shape != g.shape:
            raise ValueError(
                f"{where}: gradients must have their parameters' shapes. Found {path}: {tuple(g.shape)} for "
                f"{tuple(w.shape)}. Are they per example?"
            )
