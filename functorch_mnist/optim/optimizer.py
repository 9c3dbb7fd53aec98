"""What an optimizer is."""

from collections.abc import Callable
from typing import NamedTuple

from ..tree import Tree


class Optimizer(NamedTuple):
    """A pair of pure functions over any pytree of parameters."""

    init: Callable[[Tree], Tree]
    """`init(params) -> state`."""
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    """`update(params, state, grads) -> (params, state)`; `grads` is shaped as `params`."""
