"""One training step.

    G = Σ_i m_i ∇loss(w; example_i),    (w, s) ← optimizer(w, s, G / divisor)

An estimator works on sums over examples and the step divides once, so that chunks, padding and several processes give
the same result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import grad, vmap

from .. import tree
from ..batch import blanked, check
from ..optim import Optimizer
from ..tree import Tree


class State(NamedTuple):
    """All that training carries from step to step: one pytree of tensors."""

    params: Tree
    optimizer: Tree
    """The optimizer's state."""
    step: Tensor
    """0-d int64: how many steps have been made."""
    key: Tensor
    """(2,): the root of all random streams; steps do not change it."""
    estimator: Tree = ()
    """What the estimator adapts, such as a clipping norm."""


def init_state(params: Tree, optimizer: Optimizer, key: Tensor) -> State:
    """The state before the first step.

    Args:
        params: a pytree of float tensors.
        optimizer: gives its own initial state.
        key: (2,), the root of the order of examples and of dropout.
    """
    return State(params, optimizer.init(params), torch.zeros((), dtype=torch.int64, device=key.device), key)


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator: `(params, *batch, mask) -> (grads, aux)`, sums over the examples of the batch.

    `grads` is shaped as `params`; `aux` holds tensors, the 0-d sum `"loss"` at least. A masked example, whatever it
    holds, adds exactly nothing.
    """

    fn: Callable[..., tuple[Tree, dict[str, Tensor]]]

    def __call__(self, params: Tree, *batch: Tensor, mask: Tensor | None = None) -> tuple[Tree, dict[str, Tensor]]:
        return self.fn(params, *batch, mask=mask)


def gradient(loss_fn: Callable[..., Tensor]) -> Estimator:
    """The estimator of the plain gradient, from the loss of one example.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.

    Raises:
        ValueError: from the estimator, for a loss that is not 0-d, or a batch that does not fit.
    """

    def one(params: Tree, *example: Tensor) -> Tensor:
        loss = loss_fn(params, *example)
        if loss.shape != ():
            raise ValueError(
                f"gradient: the loss of one example must be 0-d. Found {tuple(loss.shape)}. Is a mean missing?"
            )
        return loss

    return batch_gradient(lambda params, *batch: vmap(one, in_dims=(None, *[0] * len(batch)))(params, *batch))


def batch_gradient(losses_fn: Callable[..., Tensor]) -> Estimator:
    """The estimator of the plain gradient, from the losses of a batch: for forwards that take leading axes as they are.

    Args:
        losses_fn: `losses_fn(params, *batch) -> (B,)`, pure, its i-th number a function of the i-th example alone.

    Raises:
        ValueError: from the estimator, for losses that are not (B,), or a batch that does not fit.
    """

    def estimate(params: Tree, *batch: Tensor, mask: Tensor | None) -> tuple[Tree, dict[str, Tensor]]:
        rows = check("gradient", batch, mask)

        def total(params: Tree) -> tuple[Tensor, Tensor]:
            losses = losses_fn(params, *blanked(batch, mask))
            if losses.shape != (rows,):
                raise ValueError(
                    f"batch_gradient: the losses must be one per example, ({rows},). Found {tuple(losses.shape)}. "
                    "Is there a mean?"
                )
            loss = (losses if mask is None else torch.where(mask, losses, 0.0)).sum()
            return loss, loss.detach()

        grads, loss = grad(total, has_aux=True)(params)
        return grads, {"loss": loss}

    return Estimator(estimate)


class Step(Protocol):
    """`step(state, *batch) -> (state, aux)`, the shape of a scan."""

    def __call__(
        self, state: State, *batch: Tensor, mask: Tensor | None = None, divisor: float | Tensor | None = None
    ) -> tuple[State, dict[str, Tensor]]: ...


def make_step(loss_fn: Callable[..., Tensor] | Estimator, optimizer: Optimizer) -> Step:
    """A training step: the estimator, one division, the optimizer.

    Args:
        loss_fn: an estimator, or the loss of one example, `loss_fn(params, *example) -> ()`, which stands for
            `gradient(loss_fn)`.
        optimizer: gets the mean gradient.

    Returns:
        `step(state, *batch, mask=None, divisor=None) -> (state, aux)`. `batch`: tensors (B, …). `mask`: (B,) bool.
        `divisor`: what the sums are divided by, by default B. `aux`: the estimator's, the sum `"loss"` in it.

    Raises:
        ValueError: from the step, for tensors that differ in B, a mask that is not (B,) bool, and without a divisor for
            a mask (B would count padding) or an empty batch.

    Guarantees: pure. Compiles as one graph.

    Example:
        >>> from functorch_mnist import optim, random
        >>> step = make_step(lambda w, x: (w - x) ** 2, optim.sgd(0.5))
        >>> state = init_state(torch.tensor(0.0), optim.sgd(0.5), random.key(0))
        >>> state, aux = step(state, torch.tensor([1.0, 3.0]))
        >>> state.params, aux["loss"]
        (tensor(2.), tensor(10.))
    """
    estimator = loss_fn if isinstance(loss_fn, Estimator) else gradient(loss_fn)

    def step(
        state: State, *batch: Tensor, mask: Tensor | None = None, divisor: float | Tensor | None = None
    ) -> tuple[State, dict[str, Tensor]]:
        rows = check("step", batch, mask)
        if divisor is None and mask is not None:
            raise ValueError("step: a mask needs a divisor, for B counts the padding. Pass the number of real rows.")
        if divisor is None and rows == 0:
            raise ValueError("step: a batch without a divisor must have an example. Found B = 0. Pass a divisor?")
        sums, aux = estimator(state.params, *batch, mask=mask)
        count = rows if divisor is None else divisor
        grads = tree.map(lambda g: g / count, sums)
        params, optimizer_state = optimizer.update(state.params, state.optimizer, grads)
        return state._replace(params=params, optimizer=optimizer_state, step=state.step + 1), aux

    return step
