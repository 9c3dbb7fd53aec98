"""Hyperparameters: a Python number is checked; a 0-d tensor is never read, only its shape is.

So a run can be vmapped over hyperparameters and differentiated by them, and no new value recompiles a step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_FLOAT32_MAX = torch.finfo(torch.float32).max


class Rule(NamedTuple):
    """What a Python number must be, in words and as a test."""

    words: str
    holds: Callable[[float], bool]


FINITE = Rule("a number of float32", lambda value: abs(value) <= _FLOAT32_MAX)
AT_LEAST_ZERO = Rule("a number of float32, at least 0", lambda value: 0 <= value <= _FLOAT32_MAX)
ABOVE_ZERO = Rule("above 0", lambda value: value > 0)
PART = Rule("in [0, 1]", lambda value: 0 <= value <= 1)
DECAY = Rule("in [0, 1)", lambda value: 0 <= value < 1)
COUNT = Rule("a whole number, at least 0", lambda value: 0 <= value < math.inf and value % 1 == 0)
PERIOD = Rule("a whole number, at least 1", lambda value: 1 <= value < math.inf and value % 1 == 0)


def check(where: str, rule: Rule, **numbers: float | Tensor) -> None:
    """Raises ValueError for a Python number that breaks the rule and for a tensor that is not 0-d."""
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            if value.shape != ():
                raise ValueError(f"{where}: a tensor {name} must be 0-d. Found {tuple(value.shape)}.")
        elif not rule.holds(value):
            raise ValueError(f"{where}: {name} must be {rule.words}. Found {value}.")


def check_rate(where: str, lr: float | Tensor | Callable[[Tensor], Tensor]) -> None:
    """Raises for a learning rate that is no number at least 0, 0-d tensor or schedule."""
    if isinstance(lr, (int, float, Tensor)):
        check(where, AT_LEAST_ZERO, lr=lr)
    elif not callable(lr):
        raise TypeError(f"{where}: lr must be a number, a 0-d tensor or a schedule. Found {type(lr).__name__}.")


def used(value: float | Tensor) -> bool:
    """Whether a term with this factor is to be computed: not if it is the Python number 0."""
    return isinstance(value, Tensor) or value != 0


def double(value: float | Tensor) -> float | Tensor:
    """The number in float64, as Python's are."""
    return value.to(torch.float64) if isinstance(value, Tensor) else value


def like(value: float | Tensor, leaf: Tensor) -> float | Tensor:
    """The number in the leaf's type and on its device; a Python number as it is."""
    return value.to(leaf.device, leaf.dtype) if isinstance(value, Tensor) else value


def add_scaled(a: Tensor, b: Tensor, factor: float | Tensor) -> Tensor:
    """`a + factor · b`, rounded once or twice as `torch.optim` does; the plain expression would not be."""
    if isinstance(factor, Tensor):
        return torch.addcmul(a, b, factor.to(a.device, a.dtype))
    return torch.add(a, b, alpha=factor)
