"""What the accountant is told of a step: how examples are sampled, and how much noise there is."""

import sys
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Poisson:
    """Each example joins a step by a coin of its own; neighbours differ by an example added or removed."""

    rate: float
    """q in (0, 1]: the chance of an example to join a step."""
    noise_multiplier: float
    """σ, above 0: the deviation of the noise over the sensitivity of all that a step releases."""

    def __post_init__(self) -> None:
        _check_number("Poisson", "rate", self.rate)
        _check_number("Poisson", "noise_multiplier", self.noise_multiplier)
        if self.rate > 1:
            raise ValueError(f"Poisson: rate must be above 0 and at most 1. Found {self.rate}.")

    @property
    def relation(self) -> str:
        """Which data sets are neighbours, in words."""
        return "one example added or removed"


@dataclass(frozen=True)
class Shuffled:
    """Batches of one size, cut from a shuffled epoch: each example is in one batch of each epoch.

    Nothing is ever claimed for the sampling. Neighbours differ by one example that is replaced by one without gradient.
    """

    steps_per_epoch: int
    """At least 1."""
    noise_multiplier: float
    """σ, above 0: the deviation of the noise over the sensitivity of all that a step releases."""

    def __post_init__(self) -> None:
        if type(self.steps_per_epoch) is not int:
            raise TypeError(f"Shuffled: steps_per_epoch must be an int. Found {type(self.steps_per_epoch).__name__}.")
        if self.steps_per_epoch < 1:
            raise ValueError(f"Shuffled: steps_per_epoch must be at least 1. Found {self.steps_per_epoch}.")
        _check_number("Shuffled", "noise_multiplier", self.noise_multiplier)

    @property
    def relation(self) -> str:
        """Which data sets are neighbours, in words."""
        return "one example replaced by one without gradient"


Mechanism: TypeAlias = Poisson | Shuffled


def _check_number(where: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} must be a number. Found {type(value).__name__}.")
    if not 0 < value <= sys.float_info.max:  # which a large int exceeds, too
        raise ValueError(f"{where}: {name} must be above 0 and finite. Found {value}.")
