"""Stochastic gradient descent with momentum.

g_t = ±∇_t + weight_decay · w_t                     (minus to maximize)
v_t = momentum · v_{t-1} + (1 - dampening) · g_t    (v_0 = g_0)
w_{t+1} = w_t - lr · v_t                            (nesterov: g_t + momentum · v_t in place of v_t)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments, tree
from ..hyperparameters import AT_LEAST_ZERO, FINITE, add_scaled, check, check_rate, like, used
from ..tree import Tree
from .optimizer import Optimizer, check_grads, check_kind, check_state, no_updates
from .schedules import Schedule


class SGDState(NamedTuple):
    """What evolves besides the parameters."""

    updates: Tensor
    """0-d int64: how many updates have been made."""
    velocity: Tree
    """Shaped as the parameters; an empty tuple without momentum."""


def sgd(
    lr: float | Tensor | Schedule,
    *,
    momentum: float | Tensor = 0.0,
    dampening: float = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Stochastic gradient descent with momentum.

    Args:
        lr: learning rate: a number at least 0, a 0-d tensor, or a schedule.
        momentum: decay of the velocity per update, at least 0, or a 0-d tensor.
        dampening: the part of each new gradient, but the first, that the velocity leaves out.
        weight_decay: factor of the parameters that is added to the gradient, at least 0, or a 0-d tensor.
        nesterov: step along the gradient plus momentum times the velocity.
        maximize: ascend.

    Returns:
        An optimizer whose state is an `SGDState`.

    Raises:
        ValueError: a number is negative or not finite; a tensor is not 0-d; `nesterov` without momentum or with
            dampening. From `update`: gradients without the structure and shapes of the parameters, or a state that is
            not of their shapes, types and device.
        TypeError: `lr` is no number, tensor or schedule.

    Guarantees: equals `torch.optim.SGD` bit for bit on CPU where `lr`, `momentum` and `weight_decay` are numbers.
        Differentiable with respect to parameters, gradients and tensor hyperparameters. No tensor is read: with a
        tensor momentum there is always a velocity, whatever its value. A leaf that is not a float tensor is refused by
        `init`.

    Example:
        >>> optimizer = sgd(0.1, momentum=0.9)
        >>> params = {"w": torch.tensor([1.0])}
        >>> params, state = optimizer.update(params, optimizer.init(params), {"w": torch.tensor([2.0])})
        >>> params
        {'w': tensor([0.8000])}

    Reference: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
        The form is that of `torch.optim.SGD`.
    """
    check_rate("sgd", lr)
    check("sgd", AT_LEAST_ZERO, momentum=momentum, weight_decay=weight_decay)
    check("sgd", FINITE, dampening=dampening)
    if nesterov and (not used(momentum) or dampening != 0):
        raise ValueError(f"sgd: nesterov needs momentum and no dampening. Found {momentum} and {dampening}.")

    def init(params: Tree) -> SGDState:
        arguments.check_params("sgd", params)
        return SGDState(no_updates(params), tree.zeros_like(params) if used(momentum) else ())

    def update(params: Tree, state: SGDState, grads: Tree) -> tuple[Tree, SGDState]:
        check_grads("sgd", params, grads)
        check_kind("sgd", state, SGDState)
        check_state("sgd", params, state.updates, **({"velocity": state.velocity} if used(momentum) else {}))
        rate = lr(state.updates) if callable(lr) else lr
        g = tree.map(torch.neg, grads) if maximize else grads
        if used(weight_decay):
            g = tree.map(lambda g, w: add_scaled(g, w, weight_decay), g, params)
        velocity = state.velocity
        if used(momentum):
            velocity = tree.map(lambda v, g: torch.add(like(momentum, v) * v, g, alpha=1 - dampening), velocity, g)
            if dampening:
                velocity = tree.map(lambda v, g: torch.where(state.updates == 0, g, v), velocity, g)
            g = tree.map(lambda g, v: add_scaled(g, v, momentum), g, velocity) if nesterov else velocity
        params = tree.map(lambda w, g: add_scaled(w, g, -rate), params, g)
        return params, SGDState(state.updates + 1, velocity)

    return Optimizer(init, update, elementwise=True)
