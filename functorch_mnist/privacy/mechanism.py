"""What runs and what is accounted for: how a step samples, how much noise it adds, and which data sets are neighbours.

A mechanism is the one source of these numbers: the private step is made from it, and the accountants read the same
value. What it spends, it tells as Poisson-subsampled Gaussians:

    Poisson      each step is one, of rate q
    Shuffled     each epoch is one, of rate 1: nothing is claimed for the sampling
"""

import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

Unit: TypeAlias = Literal["example", "user"]
"""What neighbouring data sets differ by: one example, or all examples of one user."""


class Event(NamedTuple):
    """Some releases of a Poisson-subsampled Gaussian, each independent of the others."""

    rate: float
    """q in (0, 1]."""
    noise_multiplier: float
    """σ, at least 0: the deviation of the noise over the sensitivity."""
    times: int
    """How many there are, at least 1."""


@dataclass(frozen=True)
class Poisson:
    """Each example, or each user, joins a step by a coin of its own."""

    rate: float
    """q in (0, 1]: the chance to join a step."""
    noise_multiplier: float
    """σ, at least 0: the deviation of the noise over the sensitivity of all that a step releases. Without noise ε is
    infinite."""
    unit: Unit = "example"
    """Whose coin it is, and by what neighbours differ."""

    def __post_init__(self) -> None:
        check_number("Poisson", "rate", self.rate)
        check_noise("Poisson", self.noise_multiplier)
        if self.rate > 1:
            raise ValueError(f"Poisson: rate must be above 0 and at most 1. Found {self.rate}.")
        if self.unit not in get_args(Unit):
            raise ValueError(f"Poisson: unit must be of {', '.join(get_args(Unit))}. Found {self.unit!r}.")

    @property
    def relation(self) -> str:
        """Which data sets are neighbours, in words. The divisor of sums, q N, is that of both: N is public."""
        return f"one {self.unit} added or removed, their number public"

    @property
    def sampling(self) -> str:
        """How the examples of a step come to be, in words."""
        return f"Poisson, each {self.unit} with a chance of {self.rate:.6g} in each step"

    @property
    def share(self) -> float:
        """The expected part of all that joins a step."""
        return self.rate

    def events(self, steps: int) -> list[Event]:
        """What so many steps, at least 1, are to an accountant."""
        return [Event(self.rate, self.noise_multiplier, steps)]

    def restarts(self, steps: int) -> int:  # noqa: ARG002 (steps know nothing of each other)
        """How many steps' events a new secret after so many steps adds: none."""
        return 0


@dataclass(frozen=True)
class Shuffled:
    """Batches of one size, cut from a shuffled epoch: each example is in one batch of each epoch.

    Nothing is ever claimed for the sampling. Neighbours differ by one example that is replaced by one without gradient.
    """

    steps_per_epoch: int
    """At least 1."""
    noise_multiplier: float
    """σ, at least 0: the deviation of the noise over the sensitivity of all that a step releases. Without noise ε is
    infinite."""

    def __post_init__(self) -> None:
        check_count("Shuffled", "steps_per_epoch", self.steps_per_epoch)
        check_noise("Shuffled", self.noise_multiplier)

    @property
    def unit(self) -> Unit:
        """By what neighbours differ."""
        return "example"

    @property
    def relation(self) -> str:
        """Which data sets are neighbours, in words."""
        return "one example replaced by one without gradient"

    @property
    def sampling(self) -> str:
        """How the examples of a step come to be, in words."""
        return f"shuffled batches, each example once in {self.steps_per_epoch:,} steps, without amplification"

    @property
    def share(self) -> float:
        """The part of all that is in a step."""
        return 1 / self.steps_per_epoch

    def events(self, steps: int) -> list[Event]:
        """What so many steps, at least 1, are to an accountant."""
        return [Event(1.0, self.noise_multiplier, -(-steps // self.steps_per_epoch))]

    def restarts(self, steps: int) -> int:
        """How many steps' events a new secret after so many steps adds: within an epoch it shuffles all again."""
        return int(steps % self.steps_per_epoch > 0)


Mechanism: TypeAlias = Poisson | Shuffled


def check_number(where: str, name: str, value: float) -> None:
    """Refuses what is no number above 0.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} must be a number. Found {type(value).__name__}.")
    if not 0 < value <= sys.float_info.max:  # which a large int exceeds, too
        raise ValueError(f"{where}: {name} must be above 0 and finite. Found {value}.")


def check_noise(where: str, value: float) -> None:
    """Refuses what is no noise multiplier: a number of at least 0.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: noise_multiplier must be a number. Found {type(value).__name__}.")
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{where}: noise_multiplier must be at least 0 and finite. Found {value}.")


def check_count(where: str, name: str, value: int) -> None:
    """Refuses what is no whole number of at least 1.

    Raises:
        TypeError, ValueError: it is none.
    """
    if type(value) is not int:
        raise TypeError(f"{where}: {name} must be an int. Found {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{where}: {name} must be at least 1. Found {value}.")
