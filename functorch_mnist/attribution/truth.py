"""The ground truth of attribution: the training run itself, as a pure function of the weights of its examples.

    w_T(c):  w ← optimizer(w, (1 / B) Σ_{i in batch} c_i ∇_i(w)),   T steps

With all weights 1 it is ordinary training. A weight of 0 leaves an example out: leave-one-out retraining. The
derivative at 1 is the example's contribution through every step: unrolled differentiation. Both keep batches, order and
divisor.

Reference: leave-one-out: Cook and Weisberg, "Residuals and influence in regression", 1982. Through training: Hara et
al., "Data cleansing for models trained with SGD", NeurIPS 2019; Bae et al., "Training data attribution via approximate
unrolled differentiation", NeurIPS 2024.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from .. import tree
from ..batch import check
from ..optim import Optimizer
from ..tree import Tree


class Run(NamedTuple):
    """A training run: everything that determines its result, except the weights of its examples."""

    loss_fn: Callable[..., Tensor]
    """`loss_fn(params, *example) -> ()`, pure."""
    optimizer: Optimizer
    """Gets the mean gradient of each step, weighted."""
    params: Tree
    """The initial parameters."""
    examples: tuple[Tensor, ...]
    """The training examples, tensors (N, …)."""
    order: Tensor
    """(T, B) int64: the examples of the batch of each step."""


def trained(run: Run, weights: Tensor) -> Tree:
    """The final parameters of a run with given weights of its examples.

    Args:
        run: the run.
        weights: (N,): the factor of each example's gradient, 1 for ordinary training.

    Returns:
        A tree like `run.params`, differentiable with respect to the weights.

    Raises:
        ValueError: the weights are not (N,), or the order is not (T, B).

    Cost: the run; differentiated, the activations of all its steps: `unrolled` needs the square root of them.

    Example:
        >>> from functorch_mnist import optim
        >>> run = Run(lambda w, x: w * x, optim.sgd(1.0), torch.tensor(0.0), (torch.ones(2),), torch.tensor([[0, 1]]))
        >>> trained(run, torch.tensor([1.0, 0.0]))
        tensor(-0.5000)
    """
    _check("trained", run, weights)
    return _after(run, _start(run), run.order, weights)[0]


def _check(where: str, run: Run, weights: Tensor) -> None:
    """Raises where the weights or the order do not fit."""
    count = check(where, run.examples, None)
    if weights.shape != (count,) or run.order.dim() != 2 or run.order.shape[1] < 1 or run.order.is_floating_point():
        raise ValueError(
            f"{where}: weights must be ({count},) and the order integers (T, B). "
            f"Found {tuple(weights.shape)} and {run.order.dtype} {tuple(run.order.shape)}."
        )


def _start(run: Run) -> tuple[Tree, Tree]:
    return run.params, run.optimizer.init(run.params)


def _after(run: Run, start: tuple[Tree, Tree], order: Tensor, weights: Tensor) -> tuple[Tree, Tree]:
    """The parameters and the optimizer's state after some more steps."""
    losses_fn = vmap(run.loss_fn, in_dims=(None, *[0] * len(run.examples)))
    params, state = start
    for index in order:
        rows, factors = [x[index] for x in run.examples], weights[index]

        def mean(params: Tree, rows: list[Tensor] = rows, factors: Tensor = factors) -> Tensor:
            return (losses_fn(params, *rows) * factors).sum() / len(factors)

        params, state = run.optimizer.update(params, state, grad(mean)(params))
    return params, state


def retrained(run: Run, test: tuple[Tensor, ...], weights: Tensor, *, chunk_size: int = 32) -> Tensor:
    """The losses of test examples after retraining with other weights.

    Args:
        run: the run.
        test: a tuple of tensors (M, …), as the loss takes them.
        weights: (R, N), the weights of each of R runs; 0 leaves an example out.
        chunk_size: runs in one call of `vmap`, at least 1. As many copies of the parameters are held.

    Returns:
        (R, M).

    Raises:
        ValueError: the weights are not (R, N), or `chunk_size` is below 1.

    Cost: R training runs.
    """
    if weights.dim() != 2 or weights.shape[1] != len(run.examples[0]) or chunk_size < 1:
        raise ValueError(
            f"retrained: weights must be (R, {len(run.examples[0])}) and chunk_size at least 1. "
            f"Found {tuple(weights.shape)} and {chunk_size}."
        )
    return torch.cat(
        [vmap(lambda row: _test_losses(run, test, trained(run, row)))(part) for part in weights.split(chunk_size)]
    )


def leave_one_out(run: Run, test: tuple[Tensor, ...], which: Tensor, *, chunk_size: int = 32) -> Tensor:
    """Leave-one-out retraining: how much the losses of test examples rise without each of some training examples.

    Args:
        run, test, chunk_size: as in `retrained`.
        which: (R,) int64, the training examples to leave out, one per run.

    Returns:
        (R, M): the loss without the example minus the loss with it; above zero where the example helped.

    Raises:
        ValueError: `which` is not (R,) int64, or `chunk_size` is below 1.

    Cost: R + 1 training runs.

    Reference: Cook, Weisberg, "Residuals and influence in regression", 1982.
    """
    if which.dim() != 1 or which.dtype != torch.int64:
        raise ValueError(f"leave_one_out: which must be int64 (R,). Found {which.dtype} {tuple(which.shape)}.")
    ones = _ones(run)
    without = ones.repeat(len(which), 1).scatter(1, which[:, None], 0.0)
    losses = retrained(run, test, torch.cat([ones[None], without]), chunk_size=chunk_size)
    return losses[1:] - losses[0]


def unrolled(run: Run, test: tuple[Tensor, ...], weights: Tensor | None = None, *, chunk_size: int = 8) -> Tensor:
    """Unrolled differentiation: the derivative of test losses with respect to each training example's weight, negated.

    Args:
        run: the run.
        test: a tuple of tensors (M, …), as the loss takes them.
        weights: (N,), at which the run is differentiated; by default all 1. To predict runs that leave out a fraction p
            of the examples, 1 - p is the midpoint.
        chunk_size: test examples in one call of `vmap`, at least 1.

    Returns:
        (N, M): `-d loss_j / d c_i`; above zero where the example helped.

    Raises:
        ValueError: the weights are not (N,), or `chunk_size` is below 1.

    Guarantees: exact: the derivative of the whole run, through all its steps.

    Cost: memory for √T of the T states, the activations of √T steps and M adjoints. Two runs forward, and one backward
        pass through the run per test example.

    Reference: Hara, Nitanda, Maehara, "Data cleansing for models trained with SGD", NeurIPS 2019; Bae, Lin, Lorraine,
        Grosse, "Training data attribution via approximate unrolled differentiation", NeurIPS 2024.
    """
    if chunk_size < 1:
        raise ValueError(f"unrolled: chunk_size must be at least 1. Found {chunk_size}.")
    weights = _ones(run) if weights is None else weights
    _check("unrolled", run, weights)
    stretches = run.order.split(max(1, math.isqrt(len(run.order))))
    starts = [_start(run)]
    for order in stretches[:-1]:
        starts.append(_after(run, starts[-1], order, weights))

    def last(floats: list[Tensor], weights: Tensor) -> Tensor:
        params, _ = _after(run, _joined(starts[-1], floats), stretches[-1], weights)
        return _test_losses(run, test, params)

    losses, pull, *_ = vjp(last, _floats(starts[-1]), weights)
    units = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    adjoints, found = _pulled(pull, [units], chunk_size)
    for start, order in zip(starts[-2::-1], stretches[-2::-1], strict=True):

        def onward(
            floats: list[Tensor], weights: Tensor, start: tuple[Tree, Tree] = start, order: Tensor = order
        ) -> list[Tensor]:
            return _floats(_after(run, _joined(start, floats), order, weights))

        _, pull, *_ = vjp(onward, _floats(start), weights)
        adjoints, more = _pulled(lambda *cotangents, pull=pull: pull(list(cotangents)), adjoints, chunk_size)
        found = found + more
    return -found.T


def _pulled(
    pull: Callable[..., tuple[list[Tensor], Tensor]], cotangents: list[Tensor], chunk_size: int
) -> tuple[list[Tensor], Tensor]:
    """Of each test example the cotangents (M, …) of what a stretch starts from, and those of the weights, (M, N)."""
    parts = zip(*[rows.split(chunk_size) for rows in cotangents], strict=True)
    pulled = [vmap(pull)(*part) for part in parts]
    adjoints = [torch.cat(rows) for rows in zip(*[floats for floats, _ in pulled], strict=True)]
    return adjoints, torch.cat([of_weights for _, of_weights in pulled])


def _floats(state: Tree) -> list[Tensor]:
    """The leaves that are differentiated: not counts."""
    return [leaf for leaf in tree.leaves(state) if leaf.is_floating_point()]


def _joined(state: tuple[Tree, Tree], floats: list[Tensor]) -> tuple[Tree, Tree]:
    """The state with these leaves in place of its float ones."""
    rest = iter(floats)
    return tree.unflatten(state, [next(rest) if leaf.is_floating_point() else leaf for leaf in tree.leaves(state)])


def _test_losses(run: Run, test: tuple[Tensor, ...], params: Tree) -> Tensor:
    return vmap(run.loss_fn, in_dims=(None, *[0] * len(test)))(params, *test)


def _ones(run: Run) -> Tensor:
    like = tree.leaves(run.params)[0]
    return torch.ones(len(run.examples[0]), dtype=like.dtype, device=like.device)
