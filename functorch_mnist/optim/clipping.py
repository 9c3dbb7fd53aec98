"""Gradient clipping, as an optimizer around an optimizer."""

from torch import Tensor

from .. import tree
from ..hyperparameters import ABOVE_ZERO, check
from ..tree import Tree
from .optimizer import Optimizer


def clip_by_global_norm(optimizer: Optimizer, *, max_norm: float | Tensor) -> Optimizer:
    """The optimizer, given gradients scaled down to norm `max_norm` where theirs is larger.

    Args:
        optimizer: gets the scaled gradients.
        max_norm: the largest Euclidean norm of the whole tree, above 0, or a 0-d tensor.

    Raises:
        ValueError: `max_norm` is not above 0, or a tensor that is not 0-d.

    Guarantees: equals `torch.nn.utils.clip_grad_norm_` before the update; the state is the optimizer's own.

    Reference: Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013, algorithm 1.
    """
    check("clip_by_global_norm", ABOVE_ZERO, max_norm=max_norm)

    def update(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        scale: Tensor = (max_norm / (tree.norm(grads) + 1e-6)).clamp(max=1)
        return optimizer.update(params, state, tree.map(lambda g: g * scale.to(g.dtype), grads))

    return Optimizer(optimizer.init, update)
