"""Gradient clipping, as an optimizer around an optimizer."""

import math

from torch import Tensor

from .. import tree
from ..tree import Tree
from .optimizer import Optimizer


def clip_by_global_norm(optimizer: Optimizer, *, max_norm: float) -> Optimizer:
    """The optimizer, given gradients scaled down to norm `max_norm` where theirs is larger.

    Args:
        optimizer: gets the scaled gradients.
        max_norm: the largest Euclidean norm of the whole tree, above 0.

    Raises:
        ValueError: `max_norm` is not above 0.

    Guarantees: equals `torch.nn.utils.clip_grad_norm_` before the update; the state is the optimizer's own.

    Reference: Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013, algorithm 1.
    """
    if not max_norm > 0 or math.isnan(max_norm):
        raise ValueError(f"clip_by_global_norm: max_norm must be above 0. Found {max_norm}.")

    def update(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        scale: Tensor = (max_norm / (tree.norm(grads) + 1e-6)).clamp(max=1)
        return optimizer.update(params, state, tree.map(lambda g: g * scale.to(g.dtype), grads))

    return Optimizer(optimizer.init, update)
