"""Descent on hyperparameters by hypergradients.

Each hyperparameter is reparameterised, on a scale such as the logarithm, as an unbounded number. This number moves by a
step that grows while the gradient keeps its sign and shrinks where the sign changes (Rprop): hypergradients differ by
orders of magnitude between hyperparameters and between points, and most of their information is in the sign.

Reference: Riedmiller, Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm", IEEE
International Conference on Neural Networks, 1993.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .vmapped import Values


class Scale(NamedTuple):
    """How a hyperparameter is reparameterised as an unbounded number."""

    to: Callable[[Tensor], Tensor]
    """From the hyperparameter to the number, 0-d tensors."""
    back: Callable[[Tensor], Tensor]
    """The inverse, from any number to an allowed value."""


LOG = Scale(torch.log, torch.exp)
"""For what is above 0, such as learning rates: a step multiplies."""
LOG_FROM_ONE = Scale(lambda value: -torch.log1p(-value), lambda number: -torch.expm1(-number.clamp(0, 13.8)))
"""For what is in [0, 1), such as momentum: a step multiplies the distance from 1; it stays from 0 to 1 - 1e-6."""


class Trial(NamedTuple):
    """One evaluation of the objective."""

    hyper: Values
    """The hyperparameters, 0-d tensors by name."""
    loss: float
    """Their loss; infinite where training diverged."""


class Tuned(NamedTuple):
    """The result of `tune`."""

    hyper: Values
    """The hyperparameters of the trial with the least loss."""
    loss: float
    """That loss; infinite where every trial diverged."""
    trials: list[Trial]
    """All trials, in order."""


def tune(
    objective: Callable[[Values], tuple[Tensor, Values]],
    start: Values,
    *,
    scales: Mapping[str, Scale],
    rounds: int,
    first_step: float = 0.5,
    max_step: float = 1.0,
    callback: Callable[[Trial], None] = lambda _: None,
) -> Tuned:
    """Descent on hyperparameters by sign-based steps (Rprop).

    Args:
        objective: `objective(hyper) -> (loss, grads)`, a deterministic function, such as a `hypergradient`'s. `loss` is
            0-d, `grads` 0-d tensors by the names of `hyper`.
        start: the first values, 0-d float tensors by name.
        scales: of each hyperparameter, `LOG`, `LOG_FROM_ONE` or another `Scale`.
        rounds: evaluations of the objective, at least 1.
        first_step: length of the first move, on the scale: for `LOG` a factor of exp(first_step).
        max_step: length of the longest move, on the scale.
        callback: called with each trial.

    Returns:
        The best hyperparameters, their loss, and all trials.

    Raises:
        ValueError: `rounds` is below 1, a scale is missing, or a start lies at the end of its scale.
        TypeError: a scale is no `Scale`, or a start no tensor.

    Guarantees: the result is never worse than the start. From a point where training diverges, the next trial is half
        way back to the best one.

    Example:
        >>> def objective(hyper):  # (log lr)²
        ...     log = hyper["lr"].log()
        ...     return log**2, {"lr": 2 * log / hyper["lr"]}
        >>> tuned = tune(objective, {"lr": torch.tensor(10.0)}, scales={"lr": LOG}, rounds=9)
        >>> round(float(tuned.hyper["lr"]), 1)
        1.1

    Reference: Riedmiller, Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm",
        IEEE International Conference on Neural Networks, 1993.
    """
    if rounds < 1 or set(start) != set(scales):
        raise ValueError(
            f"tune: rounds must be at least 1, and scales for {list(start)}. Found {rounds}, {list(scales)}."
        )
    for name, scale in scales.items():
        if not isinstance(scale, Scale) or not isinstance(start[name], Tensor):
            raise TypeError(
                f"tune: a scale must be a sweep.Scale and a start a 0-d tensor. Found {scale!r:.40} and "
                f"{start[name]!r:.40} of {name}. Pass sweep.LOG and torch.tensor(…)?"
            )
    numbers = {name: scales[name].to(value.double()) for name, value in start.items()}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"tune: {name} must lie within its scale. Found {float(start[name])}.")
    steps = dict.fromkeys(numbers, first_step)
    signs = dict.fromkeys(numbers, 0.0)
    best, best_loss, trials = numbers, math.inf, list[Trial]()
    for _ in range(rounds):
        hyper = {name: scales[name].back(number).to(start[name].dtype) for name, number in numbers.items()}
        loss, grads = objective(hyper)
        slopes = {name: float(slope) for name, slope in grads.items()}
        trials.append(Trial(hyper, float(loss) if math.isfinite(loss) else math.inf))
        callback(trials[-1])
        if trials[-1].loss < best_loss:
            best, best_loss = numbers, trials[-1].loss
        if not math.isfinite(loss) or not all(map(math.isfinite, slopes.values())):
            if best_loss == math.inf or best is numbers:  # no better point to return to: try smaller values
                numbers = {name: number - max_step for name, number in numbers.items()}
            else:
                numbers = {name: (number + best[name]) / 2 for name, number in numbers.items()}
            steps = {name: step / 2 for name, step in steps.items()}
            signs = dict.fromkeys(signs, 0.0)
            continue
        moved = {}
        for name, number in numbers.items():
            sign = math.copysign(1.0, slopes[name]) if slopes[name] else 0.0
            kept = sign * signs[name]
            steps[name] = min(max_step, steps[name] * (1.2 if kept > 0 else 0.5 if kept < 0 else 1.0))
            moved[name], signs[name] = number - sign * steps[name], sign
        numbers = moved
    values = {name: scales[name].back(number).to(start[name].dtype) for name, number in best.items()}
    return Tuned(values, best_loss, trials)
