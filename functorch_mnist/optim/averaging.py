"""Running averages of the parameters, as optimizers around an optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..hyperparameters import COUNT, DECAY, PERIOD, check
from ..tree import Tree
from .optimizer import Optimizer, check_kind, check_state, no_updates


class Averaged(NamedTuple):
    """What evolves besides the parameters."""

    optimizer: Tree
    """The state of the optimizer inside."""
    updates: Tensor
    """0-d int64: how many updates have been made."""
    average: Tree
    """Shaped as the parameters, float32 or wider."""


def exponential_moving_average(optimizer: Optimizer, *, decay: float | Tensor) -> Optimizer:
    """The optimizer, which also keeps an exponential moving average of the parameters.

        a_t = d_t a_{t-1} + (1 - d_t) w_t,    d_t = min(decay, t / (t + 9))

    The parameters themselves are not changed by it: it is the average that is to be evaluated. Early on it forgets
    faster, so that it does not depend on where training started.

    Args:
        optimizer: makes the updates.
        decay: in [0, 1), or a 0-d tensor: the average is over about 1 / (1 - decay) updates.

    Returns:
        An optimizer whose state is an `Averaged`.

    Raises:
        ValueError: `decay` is out of its range, or a tensor that is not 0-d. From `update`: a state that is not of the
            parameters' shapes, types (or float32) and device.

    Example:
        >>> from functorch_mnist import optim
        >>> slow = exponential_moving_average(optim.sgd(1.0), decay=0.5)
        >>> w = torch.tensor(1.0)
        >>> w, state = slow.update(w, slow.init(w), torch.tensor(1.0))
        >>> w, state.average
        (tensor(0.), tensor(0.1000))

    Reference: Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control 30, 1992; for
        private training De et al., "Unlocking high-accuracy differentially private image classification through scale",
        arXiv 2204.13650, section 3.
    """
    check("exponential_moving_average", DECAY, decay=decay)

    def update(params: Tree, state: Averaged, grads: Tree) -> tuple[Tree, Averaged]:
        check_kind("exponential_moving_average", state, Averaged)
        check_state("exponential_moving_average", params, state.updates, least=torch.float32, average=state.average)
        params, inner = optimizer.update(params, state.optimizer, grads)
        updates = state.updates + 1
        keep = (updates / (updates + 9)).clamp(max=decay)
        average = tree.map(lambda a, w: torch.lerp(tree.wide(w), a, keep.to(a.dtype)), state.average, params)
        return params, Averaged(inner, updates, average)

    return Optimizer(lambda params: _init(optimizer, params), update, optimizer.elementwise)


def stochastic_weight_averaging(optimizer: Optimizer, *, start: int, every: int = 1) -> Optimizer:
    """The optimizer, which also keeps the equal average of the parameters after updates start, start + every, …

        a_t = w_t                             up to t = start
        a_t = a_{t-1} + (w_t - a_{t-1}) / n   at t = start + (n - 1) · every
        a_t = a_{t-1}                         between

    The parameters themselves are not changed by it: it is the average that is to be evaluated, after as many updates
    at a large learning rate.

    Args:
        optimizer: makes the updates.
        start: the updates before the first parameters of the average, at least 0: at 0 the initial ones are in it.
        every: the updates from one member of the average to the next, at least 1.

    Returns:
        An optimizer whose state is an `Averaged`.

    Raises:
        ValueError: `start` or `every` is out of its range or not whole. From `update`: a state that is not of the
            parameters' shapes, types (or float32) and device.

    Guarantees: equals `torch.optim.swa_utils.AveragedModel` bit for bit on CPU for parameters of float32 or float64.
        Any number of updates compiles one step.

    Example:
        >>> from functorch_mnist import optim
        >>> swa = stochastic_weight_averaging(optim.sgd(1.0), start=1)
        >>> w = torch.tensor(4.0)
        >>> state = swa.init(w)
        >>> for _ in range(3):
        ...     w, state = swa.update(w, state, torch.tensor(1.0))
        >>> w, state.average
        (tensor(1.), tensor(2.))

    Reference: Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, "Averaging weights leads to wider optima and better
        generalization", UAI 2018, algorithm 1.
    """
    check("stochastic_weight_averaging", COUNT, start=start)
    check("stochastic_weight_averaging", PERIOD, every=every)

    def update(params: Tree, state: Averaged, grads: Tree) -> tuple[Tree, Averaged]:
        check_kind("stochastic_weight_averaging", state, Averaged)
        check_state("stochastic_weight_averaging", params, state.updates, least=torch.float32, average=state.average)
        params, inner = optimizer.update(params, state.optimizer, grads)
        updates = state.updates + 1
        since = (updates - start).clamp(min=0)  # also keeps the unused branch of `where` finite
        due = since % every == 0
        members = torch.div(since, every, rounding_mode="floor") + 1

        def average(a: Tensor, w: Tensor) -> Tensor:
            w = tree.wide(w)
            return torch.where(since == 0, w, torch.where(due, a + (w - a) / members.to(a.dtype), a))

        return params, Averaged(inner, updates, tree.map(average, state.average, params))

    return Optimizer(lambda params: _init(optimizer, params), update, optimizer.elementwise)


def _init(optimizer: Optimizer, params: Tree) -> Averaged:
    average = tree.map(lambda w: tree.wide(w).clone(), params)
    return Averaged(optimizer.init(params), no_updates(params), average)
