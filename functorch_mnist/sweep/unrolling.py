"""Hypergradients: the gradient of the final loss with respect to hyperparameters, in reverse mode through every step.

    s_{t+1} = step(h, s_t, x_t),  t = 0 … T - 1;    L = loss(h, s_T)

    λ_T = ∂L/∂s_T,  g = ∂L/∂h;    for t = T - 1 … 0:  g += λ_{t+1} ∂step/∂h,  λ_t = λ_{t+1} ∂step/∂s

Memory-efficient unrolling by checkpointing: every ⌈√T⌉-th state is kept, and the states between two checkpoints are
recomputed in the backward pass. So memory holds 2 √T states and the activations of one step, and the work is that of
two forward passes and one backward pass.

Reference: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible learning", ICML
2015; Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", ICML 2017. Checkpoints: Chen
et al., "Training deep nets with sublinear memory cost", 2016.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp

from .. import tree
from ..arguments import check_fn
from ..train import compiled
from ..tree import Tree


class Hypergradient(NamedTuple):
    """The final loss of a training run, and its gradient with respect to the hyperparameters."""

    loss: Tensor
    """0-d: the loss of the final state."""
    grads: Tree
    """d loss / d hyper, like the hyperparameters."""
    state: Tree
    """The final state."""


class Unrolled:
    """An unrolled training run that can be differentiated; its parts are compiled at most once."""

    def __init__(
        self,
        step: Callable[..., Tree],
        loss_fn: Callable[[Tree, Tree], Tensor],
        *,
        compile: bool = False,
    ) -> None:
        """
        Args:
            step: `step(hyper, state, *inputs) -> state`, pure. Of the state's leaves the float ones are differentiated;
                others, such as keys and counts, are carried along.
            loss_fn: `loss_fn(hyper, state) -> ()`, of the final state, such as the mean loss of held-out examples.
            compile: compile the step and its backward pass: worth it for many steps.

        Raises:
            TypeError: `step` or `loss_fn` is no function.
        """

        check_fn("hypergradient", "step", step)
        check_fn("hypergradient", "loss_fn", loss_fn)

        def onward(hyper: Tree, state: Tree, *inputs: Tensor) -> Tree:
            return step(hyper, state, *inputs)

        def back(hyper: Tree, state: Tree, cotangents: list[Tensor], *inputs: Tensor) -> tuple[Tree, list[Tensor]]:
            def floats_after(hyper: Tree, floats: list[Tensor]) -> list[Tensor]:
                return _floats(step(hyper, _joined(state, floats), *inputs))

            _, pull, *_ = vjp(floats_after, hyper, _floats(state))
            for_hyper, for_state = pull(cotangents)
            return for_hyper, for_state

        def end(hyper: Tree, state: Tree) -> tuple[tuple[Tree, list[Tensor]], Tensor]:
            def loss(hyper: Tree, floats: list[Tensor]) -> Tensor:
                value = loss_fn(hyper, _joined(state, floats))
                if value.shape != ():
                    raise ValueError(f"hypergradient: the loss must be 0-d. Found {tuple(value.shape)}. Is it a mean?")
                return value

            (for_hyper, for_state), value = grad_and_value(loss, argnums=(0, 1))(hyper, _floats(state))
            return (for_hyper, for_state), value

        self._onward: Callable[..., Tree] = compiled(onward) if compile else onward
        self._back: Callable[..., tuple[Tree, list[Tensor]]] = compiled(back) if compile else back
        self._end: Callable[..., tuple[tuple[Tree, list[Tensor]], Tensor]] = compiled(end) if compile else end

    def hypergradient(
        self,
        hyper: Tree,
        state: Tree,
        inputs: Callable[[int], tuple[Tensor, ...]],
        *,
        steps: int,
        every: int | None = None,
    ) -> Hypergradient:
        """The loss after T steps, and its gradient with respect to the hyperparameters.

        Args:
            hyper: a pytree of float tensors: learning rates, weights of examples (N,), strengths of augmentation.
            state: the initial state, a pytree of tensors.
            inputs: `inputs(t)` is the tuple of the further arguments of step t, such as its rows and keys. It is called
                up to twice for each t, and must return the same both times.
            steps: T, at least 1.
            every: steps between two checkpoints of the state, at least 1; ⌈√T⌉ by default.

        Returns:
            The final loss, its gradient, and the final state.

        Raises:
            ValueError: a number is out of its range, or the loss is not 0-d.
            TypeError: a hyperparameter is no float tensor, `inputs` is no function, or it returns a bare tensor.

        Guarantees: the same bits for every `every`. The derivative is exact, not truncated: that of the unrolled run.

        Cost: two forward passes and a backward pass of each step; memory for T / every + every states.
        """
        check_fn("hypergradient", "inputs", inputs, "Pass a function of the step: lambda t: (x[t],).")
        every = max(1, math.isqrt(max(0, steps - 1)) + 1) if every is None else every
        if steps < 1 or every < 1:
            raise ValueError(f"hypergradient: steps and every must be at least 1. Found {steps} and {every}.")
        for path, leaf in zip(tree.paths(hyper), tree.leaves(hyper), strict=True):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise TypeError(f"hypergradient: hyperparameters must be float tensors. Found {path}: {leaf!r:.80}.")

        def rows(t: int) -> tuple[Tensor, ...]:
            row = inputs(t)
            if isinstance(row, Tensor):
                raise TypeError("hypergradient: inputs(t) must be a tuple of tensors. Found one tensor. Return (x,)?")
            return row

        kept = []
        for t in range(steps):
            if t % every == 0:
                kept.append(state)
            state = self._onward(hyper, state, *rows(t))
        last = state
        (grads, cotangents), loss = self._end(hyper, last)
        for first in reversed(range(0, steps, every)):
            states = [kept.pop()]
            for t in range(first, min(first + every, steps) - 1):
                states.append(self._onward(hyper, states[-1], *rows(t)))
            while states:
                t = first + len(states) - 1
                more, cotangents = self._back(hyper, states.pop(), cotangents, *rows(t))
                grads = tree.map(torch.add, grads, more)
        return Hypergradient(loss, grads, last)


def hypergradient(
    step: Callable[..., Tree],
    loss_fn: Callable[[Tree, Tree], Tensor],
    hyper: Tree,
    state: Tree,
    inputs: Callable[[int], tuple[Tensor, ...]],
    *,
    steps: int,
    every: int | None = None,
) -> Hypergradient:
    """The gradient of a training run's final loss with respect to its hyperparameters.

    It is `Unrolled(step, loss_fn).hypergradient(hyper, state, inputs, steps=steps, every=every)`; an `Unrolled` can be
    compiled and used again.

    Args:
        step: `step(hyper, state, *inputs) -> state`, pure. Of the state's leaves the float ones are differentiated.
        loss_fn: `loss_fn(hyper, state) -> ()`, of the final state.
        hyper, state, inputs, steps, every: as in `Unrolled.hypergradient`.

    Returns:
        The final loss (), its gradient like `hyper`, and the final state.

    Raises:
        ValueError, TypeError: as in `Unrolled.hypergradient`.

    Example:
        >>> def step(lr, w, x):  # of (w - x)² / 2
        ...     return w - lr * (w - x)
        >>> result = hypergradient(step, lambda lr, w: w * w / 2, torch.tensor(0.5), torch.tensor(1.0),
        ...                       lambda t: (torch.tensor(0.0),), steps=2)
        >>> result.loss, result.grads  # (1 - lr)⁴ / 2, and -2 (1 - lr)³
        (tensor(0.0312), tensor(-0.2500))

    Reference: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible learning",
        ICML 2015; Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based hyperparameter
        optimization", ICML 2017.
    """
    return Unrolled(step, loss_fn).hypergradient(hyper, state, inputs, steps=steps, every=every)


def _floats(state: Tree) -> list[Tensor]:
    """The leaves that are differentiated."""
    return [leaf for leaf in tree.leaves(state) if leaf.is_floating_point()]


def _joined(state: Tree, floats: list[Tensor]) -> Tree:
    """The state with other float leaves."""
    values = iter(floats)
    return tree.map(lambda leaf: next(values) if leaf.is_floating_point() else leaf, state)
