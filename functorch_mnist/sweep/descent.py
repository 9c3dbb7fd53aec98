"""Descent on hyperparameters by the gradient through training.

Each hyperparameter moves on a scale of its own, on which any number stands for a value it may take. There it moves by a
step that grows while the gradient keeps its sign and shrinks where it turns (Rprop): hypergradients differ by many
powers of ten from one hyperparameter and one place to the next, and their signs say most of what they know.

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
    """How a hyperparameter is written as an unbounded number."""

    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


LOG = Scale(torch.log, torch.exp)
"""For what is above 0, such as learning rates: a step multiplies."""
LOG_FROM_ONE = Scale(lambda value: -torch.log1p(-value), lambda number: -torch.expm1(-number.clamp(0, 13.8)))
"""For what is in [0, 1), such as momentum: a step multiplies the distance from 1; it stays from 0 to 1 - 1e-6."""


class Trial(NamedTuple):
    """What was tried in a round."""

    hyper: Values
    loss: float
    """What it gave; infinite where training did not stay finite."""


class Tuned(NamedTuple):
    """What descent has found."""

    hyper: Values
    """Those of the least loss of all trials."""
    loss: float
    trials: list[Trial]
    """In order."""


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
    """The best hyperparameters that some rounds of descent find.

    Args:
        objective: `objective(hyper) -> (loss, grads)`, such as a hypergradient's; the same for the same values.
        start: where to begin, 0-d float tensors.
        scales: of each hyperparameter, its scale.
        rounds: how often the objective is asked, at least 1.
        first_step: of the first move, on the scale.
        max_step: the longest move.
        callback: told of each trial.

    Raises:
        ValueError: `rounds` is below 1, a scale is missing, or a start lies at the end of its scale.

    Guarantees: never gives a place worse than the start. From a place where training is not finite it goes back half
        the way to the best one.
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
            if best_loss == math.inf or best is numbers:  # there is no way back: try smaller ones
                numbers = {name: number - max_step for name, number in numbers.items()}
            else:
                numbers = {name: (number + best[name]) / 2 for name, number in numbers.items()}
            steps = {name: step / 2 for name, step in steps.items()}
            signs = dict.fromkeys(signs, 0.0)
            continue
        moved = {}
        for name, number in numbers.items():
            sign = math.copysign(1.0, slopes[name]) if slopes[name] else 0.0
            turned = sign * signs[name]
            steps[name] = min(max_step, steps[name] * (1.2 if turned > 0 else 0.5 if turned < 0 else 1.0))
            moved[name], signs[name] = number - sign * steps[name], sign
        numbers = moved
    found = {name: scales[name].back(number).to(start[name].dtype) for name, number in best.items()}
    return Tuned(found, best_loss, trials)
