"""Learning-rate schedules: functions of the 0-d count of updates made so far, to a 0-d tensor.

    constant       lr
    cosine         lr · (final + (1 - final) (1 + cos(π t / T)) / 2)
    one_cycle      linear from lr · start up to lr, then linear down to lr · final
    step_decay     lr · factor^⌊t / every⌋

Counts are tensors, so a compiled step is compiled once for all of training. Past its last update a schedule keeps its
final value. `lr` is a number at least 0 or a 0-d tensor, with respect to which a schedule is differentiable; the result
is float32, or float64 if that is the type of the tensor.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..hyperparameters import AT_LEAST_ZERO, PERIOD, check

Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""`schedule(count) -> lr`."""


def constant(lr: float | Tensor) -> Schedule:
    """The same learning rate at every update.

    Example:
        >>> constant(0.1)(torch.tensor(7))
        tensor(0.1000)
    """
    check("constant", AT_LEAST_ZERO, lr=lr)
    return lambda count: lr * torch.ones_like(count, dtype=_dtype(lr))


def cosine(lr: float | Tensor, *, steps: int, final: float = 0.0) -> Schedule:
    """Half a cosine from `lr` at the first update to `lr · final` after `steps`.

    Args:
        lr: at the first update, at least 0.
        steps: updates, at least 1.
        final: the fraction of `lr` that is left at the end, at least 0.

    Reference: Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017, equation 5.

    Example:
        >>> cosine(0.2, steps=10)(torch.tensor(5))
        tensor(0.1000)
    """
    check("cosine", AT_LEAST_ZERO, lr=lr, final=final)
    check("cosine", PERIOD, steps=steps)
    return lambda count: lr * (final + (1 - final) * (1 + torch.cos(math.pi * _progress(count, steps, lr))) / 2)


def one_cycle(
    lr: float | Tensor, *, steps: int, warmup: float = 0.3, start: float = 0.04, final: float = 0.0
) -> Schedule:
    """A line up from `lr · start` to `lr` over the part `warmup` of the updates, then a line down to `lr · final`.

    Args:
        lr: the peak.
        steps: length of the cycle, in updates.
        warmup: part of the cycle in (0, 1) that goes up.
        start: factor of the first learning rate.
        final: factor of the last learning rate.

    Reference: Smith and Topin, "Super-convergence: very fast training of neural networks using large learning rates",
        2018.

    Example:
        >>> one_cycle(0.1, steps=10, warmup=0.5)(torch.tensor(5))
        tensor(0.1000)
    """
    check("one_cycle", AT_LEAST_ZERO, lr=lr, start=start, final=final)
    check("one_cycle", PERIOD, steps=steps)
    if not 0 < warmup < 1:
        raise ValueError(f"one_cycle: warmup must be in (0, 1). Found {warmup}.")

    def schedule(count: Tensor) -> Tensor:
        t = _progress(count, steps, lr)
        up = start + (1 - start) * t / warmup
        down = final + (1 - final) * (1 - t) / (1 - warmup)
        return lr * torch.where(t < warmup, up, down)

    return schedule


def step_decay(lr: float | Tensor, *, every: int, factor: float = 0.1) -> Schedule:
    """`lr` multiplied by `factor` after each `every` updates.

    Args:
        lr: at the first update, at least 0.
        every: updates, at least 1.
        factor: at least 0.

    Example:
        >>> step_decay(1.0, every=10)(torch.tensor(25))
        tensor(0.0100)
    """
    check("step_decay", AT_LEAST_ZERO, lr=lr, factor=factor)
    check("step_decay", PERIOD, every=every)
    return lambda count: lr * torch.pow(factor, torch.div(count, every, rounding_mode="floor").to(_dtype(lr)))


def _progress(count: Tensor, steps: int, lr: float | Tensor) -> Tensor:
    return (count.to(_dtype(lr)) / steps).clamp(max=1)


def _dtype(lr: float | Tensor) -> torch.dtype:
    return torch.promote_types(lr.dtype, torch.float32) if isinstance(lr, Tensor) else torch.float32
