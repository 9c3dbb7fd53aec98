"""A running average of the parameters, as an optimizer around an optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..tree import Tree
from .optimizer import Optimizer


class Averaged(NamedTuple):
    """What evolves besides the parameters."""

    optimizer: Tree
    """The state of the optimizer inside."""
    updates: Tensor
    """0-d int64: how many updates have been made."""
    average: Tree
    """Shaped as the parameters, float32 or wider."""


def averaging(optimizer: Optimizer, *, decay: float) -> Optimizer:
    """The optimizer, which also keeps an exponential moving average of the parameters.

        a_t = d_t a_{t-1} + (1 - d_t) w_t,    d_t = min(decay, t / (t + 9))

    The parameters themselves are not changed by it: it is the average that is to be evaluated. Early on it forgets
    faster, so that it does not hang on where training started.

    Args:
        optimizer: makes the updates.
        decay: in [0, 1): the average is over about 1 / (1 - decay) updates.

    Raises:
        ValueError: `decay` is out of its range.

    Example:
        >>> from functorch_mnist import optim
        >>> slow = averaging(optim.sgd(1.0), decay=0.5)
        >>> w = torch.tensor(1.0)
        >>> w, state = slow.update(w, slow.init(w), torch.tensor(1.0))
        >>> w, state.average
        (tensor(0.), tensor(0.1000))

    Reference: Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control 30, 1992; for
        private training De et al., "Unlocking high-accuracy differentially private image classification through scale",
        arXiv 2204.13650, section 3.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"averaging: decay must be in [0, 1). Found {decay}.")

    def init(params: Tree) -> Averaged:
        average = tree.map(lambda w: tree.wide(w).clone(), params)
        return Averaged(optimizer.init(params), torch.zeros((), dtype=torch.int64), average)

    def update(params: Tree, state: Averaged, grads: Tree) -> tuple[Tree, Averaged]:
        params, inner = optimizer.update(params, state.optimizer, grads)
        updates = state.updates + 1
        keep = (updates / (updates + 9)).clamp(max=decay)
        average = tree.map(lambda a, w: torch.lerp(tree.wide(w), a, keep.to(a.dtype)), state.average, params)
        return params, Averaged(inner, updates, average)

    return Optimizer(init, update)
