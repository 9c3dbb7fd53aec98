"""Adam, and Adam with decoupled weight decay.

g_t = ∇_t + weight_decay · w_t                    (adam; adamw: g_t = ∇_t)
m_t = b1 · m_{t-1} + (1 - b1) · g_t               (m_0 = 0)
s_t = b2 · s_{t-1} + (1 - b2) · g_t²              (s_0 = 0)
d_t = (m_t / (1 - b1^t)) / (√(s_t / (1 - b2^t)) + epsilon)
w_{t+1} = w_t - lr · d_t                          (adamw: (1 - lr · weight_decay) · w_t - lr · d_t)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments, tree
from ..hyperparameters import AT_LEAST_ZERO, DECAY, add_scaled, check, check_rate, double, like, used
from ..tree import Tree
from .optimizer import Optimizer, check_grads, check_kind, check_state, no_updates
from .schedules import Schedule


class AdamState(NamedTuple):
    """What evolves besides the parameters."""

    updates: Tensor
    """0-d int64: how many updates have been made."""
    mean: Tree
    """Shaped as the parameters: the decaying average of the gradients."""
    square: Tree
    """Shaped as the parameters: the decaying average of their squares."""


def adam(
    lr: float | Tensor | Schedule,
    *,
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    epsilon: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
) -> Optimizer:
    """Adam: each coordinate's step is its mean gradient over the root of its mean square.

    Args:
        lr: learning rate: a number at least 0, a 0-d tensor, or a schedule.
        b1: decay of the mean per update, in [0, 1), or a 0-d tensor.
        b2: decay of the mean square per update, in [0, 1), or a 0-d tensor.
        epsilon: added to the root, at least 0, or a 0-d tensor. At 0 a coordinate whose gradients have all been zero
            becomes NaN.
        weight_decay: factor of the parameters that is added to the gradient, at least 0, or a 0-d tensor.

    Returns:
        An optimizer whose state is an `AdamState`.

    Raises:
        ValueError: a number is out of its range; a tensor is not 0-d. From `update`: gradients without the structure
            and shapes of the parameters, or a state that is not of their shapes, types and device.
        TypeError: `lr` is no number, tensor or schedule. From `init`: a leaf is not a float tensor.

    Guarantees: with numbers it equals `torch.optim.Adam` (one tensor at a time, its default on CPU) bit for bit on CPU
        in float32 and float64; 0-d float64 tensors in place of `lr`, `b1`, `b2` and `epsilon` change no bit.
        Differentiable with respect to parameters, gradients and tensor hyperparameters, also where gradients are zero.
        No tensor is read: a tensor weight decay is always added, whatever its value.

    Example:
        >>> optimizer = adam(0.1)
        >>> params = {"w": torch.tensor([1.0, 1.0])}
        >>> params, state = optimizer.update(params, optimizer.init(params), {"w": torch.tensor([2.0, -0.5])})
        >>> params
        {'w': tensor([0.9000, 1.1000])}

    Reference: Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.
    """

    def decayed(params: Tree, grads: Tree, _rate: float | Tensor) -> tuple[Tree, Tree]:
        return params, tree.map(lambda g, w: add_scaled(g, w, weight_decay), grads, params)

    return _optimizer("adam", lr, decayed, b1=b1, b2=b2, epsilon=epsilon, weight_decay=weight_decay)


def adamw(
    lr: float | Tensor | Schedule,
    *,
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    epsilon: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.01,
) -> Optimizer:
    """Adam whose weight decay shrinks the parameters instead of entering the gradient.

    Args:
        lr: learning rate, as for `adam`.
        b1: decay of the mean per update, as for `adam`.
        b2: decay of the mean square per update, as for `adam`.
        epsilon: added to the root, as for `adam`.
        weight_decay: the parameters are multiplied by 1 - lr · weight_decay before each update; at least 0, or a 0-d
            tensor.

    Returns:
        An optimizer whose state is an `AdamState`.

    Raises:
        ValueError: a number is out of its range; a tensor is not 0-d. From `update`: gradients without the structure
            and shapes of the parameters, or a state that is not of their shapes, types and device.
        TypeError: `lr` is no number, tensor or schedule. From `init`: a leaf is not a float tensor.

    Guarantees: equals `torch.optim.AdamW` as `adam` equals `torch.optim.Adam`; the same derivatives exist. Without
        weight decay it is `adam`.

    Example:
        >>> optimizer = adamw(0.1, weight_decay=1.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> params, state = optimizer.update(params, optimizer.init(params), {"w": torch.tensor([2.0])})
        >>> params
        {'w': tensor([0.8000])}

    Reference: Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2 in the form of
        `torch.optim.AdamW`, whose decay is multiplied by `lr`.
    """

    def decayed(params: Tree, grads: Tree, rate: float | Tensor) -> tuple[Tree, Tree]:
        keep = 1 - double(rate) * double(weight_decay)
        return tree.map(lambda w: w * like(keep, w), params), grads

    return _optimizer("adamw", lr, decayed, b1=b1, b2=b2, epsilon=epsilon, weight_decay=weight_decay)


def _optimizer(
    where: str,
    lr: float | Tensor | Schedule,
    decayed: Callable[[Tree, Tree, float | Tensor], tuple[Tree, Tree]],
    *,
    b1: float | Tensor,
    b2: float | Tensor,
    epsilon: float | Tensor,
    weight_decay: float | Tensor,
) -> Optimizer:
    """Either of the two: `decayed(params, grads, rate)` is how weight decay, where it is used, changes them."""
    check_rate(where, lr)
    check(where, DECAY, b1=b1, b2=b2)
    check(where, AT_LEAST_ZERO, epsilon=epsilon, weight_decay=weight_decay)

    def init(params: Tree) -> AdamState:
        arguments.check_params(where, params)
        return AdamState(no_updates(params), tree.zeros_like(params), tree.zeros_like(params))

    def update(params: Tree, state: AdamState, grads: Tree) -> tuple[Tree, AdamState]:
        check_grads(where, params, grads)
        check_kind(where, state, AdamState)
        check_state(where, params, state.updates, mean=state.mean, square=state.square)
        rate = lr(state.updates) if callable(lr) else lr
        if used(weight_decay):
            params, grads = decayed(params, grads, rate)
        return _descend(params, state, grads, rate, b1=b1, b2=b2, epsilon=epsilon)

    return Optimizer(init, update, elementwise=True)


def _descend(
    params: Tree,
    state: AdamState,
    grads: Tree,
    rate: float | Tensor,
    *,
    b1: float | Tensor,
    b2: float | Tensor,
    epsilon: float | Tensor,
) -> tuple[Tree, AdamState]:
    """One update along the corrected means. Operations and their order are those of `torch.optim`, for equal bits."""
    b1, b2 = double(b1), double(b2)
    updates = state.updates + 1
    t = updates.to(torch.float64)
    # A Python number over a tensor is the number times the reciprocal: rounded twice.
    step = double(rate) * torch.ones_like(t) / (1 - torch.pow(b1, t))
    correction = 1 - torch.pow(b2, t)
    # Python's x**0.5 and the square root differ in the last bit of one float64 in two hundred.
    correction = torch.pow(correction, torch.full_like(correction, 0.5))
    mean = tree.map(lambda m, g: torch.lerp(m, g, like(1 - b1, m)), state.mean, grads)
    square = tree.map(lambda s, g: torch.addcmul(s * like(b2, s), g * like(1 - b2, g), g), state.square, grads)

    def descend(w: Tensor, m: Tensor, s: Tensor) -> Tensor:
        return w - like(step, w) * m / (_root(s) / like(correction, w) + like(epsilon, w))

    return tree.map(descend, params, mean, square), AdamState(updates, mean, square)


def _root(square: Tensor) -> Tensor:
    """The square root with derivative 0 at 0, where that of `sqrt` is infinite and would make gradients NaN."""
    zero = square == 0
    return square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
