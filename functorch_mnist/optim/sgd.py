"""Stochastic gradient descent with momentum.

g_t = ±∇_t + weight_decay · w_t                     (minus to maximize)
v_t = momentum · v_{t-1} + (1 - dampening) · g_t    (v_0 = g_0)
w_{t+1} = w_t - lr · v_t                            (nesterov: g_t + momentum · v_t in place of v_t)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..tree import Tree
from .optimizer import Optimizer
from .schedules import Schedule

_FLOAT32_MAX = torch.finfo(torch.float32).max


class SGDState(NamedTuple):
    """What evolves besides the parameters."""

    updates: Tensor
    """0-d int64: how many updates have been made."""
    velocity: Tree
    """Shaped as the parameters; an empty tuple without momentum."""


def sgd(
    lr: float | Tensor | Schedule,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Stochastic gradient descent with momentum.

    Args:
        lr: learning rate: a number at least 0, a 0-d tensor, or a schedule.
        momentum: decay of the velocity per update, at least 0.
        dampening: the part of each new gradient, but the first, that the velocity leaves out.
        weight_decay: factor of the parameters that is added to the gradient, at least 0.
        nesterov: step along the gradient plus momentum times the velocity.
        maximize: ascend.

    Returns:
        An optimizer whose state is an `SGDState`.

    Raises:
        ValueError: a number is negative or not finite; a tensor `lr` is not 0-d; `nesterov` without momentum or with
            dampening. From `update`: gradients without the structure and shapes of the parameters.
        TypeError: `lr` is no number, tensor or schedule.

    Guarantees: equals `torch.optim.SGD` bit for bit on CPU where `lr` is a number. Differentiable with respect to
        parameters, gradients and a tensor `lr`. A leaf that is not a float tensor is refused by `init`.

    Example:
        >>> optimizer = sgd(0.1, momentum=0.9)
        >>> params = {"w": torch.tensor([1.0])}
        >>> params, state = optimizer.update(params, optimizer.init(params), {"w": torch.tensor([2.0])})
        >>> params
        {'w': tensor([0.8000])}

    Reference: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
        The form is that of `torch.optim.SGD`.
    """
    numbers = {"momentum": momentum, "weight_decay": weight_decay}
    if isinstance(lr, (int, float)):
        numbers["lr"] = lr
    elif isinstance(lr, Tensor):
        if lr.shape != ():
            raise ValueError(f"sgd: a tensor lr must be 0-d. Found {tuple(lr.shape)}.")
    elif not callable(lr):
        raise TypeError(f"sgd: lr must be a number, a 0-d tensor or a schedule. Found {type(lr).__name__}.")
    for name, value in numbers.items():
        if not 0 <= value <= _FLOAT32_MAX:
            raise ValueError(f"sgd: {name} must be a number of float32, at least 0. Found {value}.")
    if not abs(dampening) <= _FLOAT32_MAX:
        raise ValueError(f"sgd: dampening must be a number of float32. Found {dampening}.")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"sgd: nesterov needs momentum and no dampening. Found {momentum} and {dampening}.")

    def init(params: Tree) -> SGDState:
        values = tree.leaves(params)
        for path, leaf in zip(tree.paths(params), values, strict=True):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise TypeError(f"sgd: every parameter must be a float tensor. Found {path}: {leaf!r:.80}.")
        device = values[0].device if values else None
        velocity = tree.zeros_like(params) if momentum else ()
        return SGDState(torch.zeros((), dtype=torch.int64, device=device), velocity)

    def update(params: Tree, state: SGDState, grads: Tree) -> tuple[Tree, SGDState]:
        _check_shapes(params, grads)
        rate = lr(state.updates) if callable(lr) else lr
        g = tree.map(torch.neg, grads) if maximize else grads
        if weight_decay:
            g = tree.map(lambda g, w: torch.add(g, w, alpha=weight_decay), g, params)
        velocity = state.velocity
        if momentum:
            velocity = tree.map(lambda v, g: torch.add(momentum * v, g, alpha=1 - dampening), velocity, g)
            if dampening:
                velocity = tree.map(lambda v, g: torch.where(state.updates == 0, g, v), velocity, g)
            g = tree.map(lambda g, v: torch.add(g, v, alpha=momentum), g, velocity) if nesterov else velocity
        params = tree.map(lambda w, g: _descend(w, g, rate), params, g)
        return params, SGDState(state.updates + 1, velocity)

    return Optimizer(init, update)


def _check_shapes(params: Tree, grads: Tree) -> None:
    if all(tree.leaves(tree.map(lambda w, g: w.shape == g.shape, params, grads))):
        return
    for path, w, g in zip(tree.paths(params), tree.leaves(params), tree.leaves(grads), strict=True):
        if w.shape != g.shape:
            raise ValueError(
                f"sgd: gradients must have their parameters' shapes. Found {path}: {tuple(g.shape)} for "
                f"{tuple(w.shape)}. Are they per example?"
            )


def _descend(w: Tensor, g: Tensor, rate: float | Tensor) -> Tensor:
    """`w - rate · g`, rounded once or twice as `torch.optim.SGD` does; the plain expression would not be."""
    if isinstance(rate, Tensor):
        return torch.addcmul(w, g, rate.to(w.dtype), value=-1)
    return torch.add(w, g, alpha=-rate)
