"""What runs and what is accounted for: how a step samples, how much noise it adds, and which data sets are neighbours.

A mechanism is the one source of these numbers: the private step is made from it, and the accountants read the same
value. What it spends, it tells as Poisson-subsampled Gaussians:

    Poisson      each step is one, of rate q
    Shuffled     each epoch is one, of rate 1: nothing is claimed for the sampling
    BandMF       b steps are one, of rate b q: noise is correlated within them, and each example may join one of them
    FixedOrder   all steps are one, of rate 1: noise is correlated over all of them

A span of steps has one secret. Who goes on with a new one, as a resume does, begins a span: an epoch, b steps or a
whole run that are divided between two spans count in both.
"""

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple, TypeAlias, get_args

from ..arguments import shown
from .correlation import Strategy, Toeplitz
from .strategies import banded, bisr, lambda_cgd

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
    def sampling_rate(self) -> float:
        """The expected part of all that joins a step."""
        return self.rate

    @property
    def strategy(self) -> Strategy | None:
        """How noise is correlated: it is not."""
        return None

    def events(self, steps: int, *, start: int = 0) -> list[Event]:
        """What the steps from `start` up to `steps`, a span, are to an accountant."""
        return [Event(self.rate, self.noise_multiplier, steps - start)]


class _EachOnce:
    """What batches have in common that take each example once in an epoch: nothing is claimed for the sampling."""

    steps_per_epoch: int
    unit: ClassVar[Unit] = "example"
    """By what neighbours differ."""
    relation: ClassVar[str] = "one example replaced by one without gradient"
    """Which data sets are neighbours, in words."""

    @property
    def sampling_rate(self) -> float:
        """The part of all that is in a step."""
        return 1 / self.steps_per_epoch


@dataclass(frozen=True)
class Shuffled(_EachOnce):
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
    def sampling(self) -> str:
        """How the examples of a step come to be, in words."""
        return f"shuffled batches, each example once in {self.steps_per_epoch:,} steps, without amplification"

    @property
    def strategy(self) -> Strategy | None:
        """How noise is correlated: it is not."""
        return None

    def events(self, steps: int, *, start: int = 0) -> list[Event]:
        """What the steps from `start` up to `steps`, a span, are to an accountant."""
        return [Event(1.0, self.noise_multiplier, _touched(start, steps, self.steps_per_epoch))]


@dataclass(frozen=True)
class BandMF:
    """Banded matrix factorisation with cyclic Poisson sampling.

    Examples are divided into b groups by a keyed coin each. Step t takes each example of group t mod b by a coin of its
    own, with chance b q. The strategy is block diagonal, `banded`, so a step needs the draws of its block alone.

    Reference: Choquette-Choo et al., "(Amplified) banded matrix factorization: a unified approach to private training",
        NeurIPS 2023, theorem 4.
    """

    rate: float
    """q in (0, 1 / b]: the expected part of all examples that joins a step."""
    noise_multiplier: float
    """σ, at least 0: the deviation of a draw over the sensitivity of a step and the longest column of C."""
    bands: int
    """b, at least 1."""
    steps: int
    """n, at least b: what the strategy has the least error for. Any number may be made."""

    def __post_init__(self) -> None:
        check_number("BandMF", "rate", self.rate)
        check_noise("BandMF", self.noise_multiplier)
        check_count("BandMF", "bands", self.bands)
        check_count("BandMF", "steps", self.steps)
        if self.chance > 1 or self.bands > self.steps:
            raise ValueError(
                f"BandMF: bands must be at most 1 / rate and at most steps. Found {self.bands}, rate {self.rate}, "
                f"{self.steps} steps. Fewer bands?"
            )

    @property
    def chance(self) -> float:
        """b q: the chance to join, of an example whose group's turn it is."""
        return self.bands * self.rate

    @property
    def unit(self) -> Unit:
        """By what neighbours differ."""
        return "example"

    @property
    def relation(self) -> str:
        """Which data sets are neighbours, in words."""
        return "one example added or removed, their number public"

    @property
    def sampling(self) -> str:
        """How the examples of a step come to be, in words."""
        return (
            f"cyclic Poisson, each example with a chance of {self.chance:.6g} in every {self.bands}th step; noise "
            f"correlated in {self.bands} bands"
        )

    @property
    def sampling_rate(self) -> float:
        """The expected part of all that joins a step."""
        return self.rate

    @property
    def strategy(self) -> Strategy | None:
        """How noise is correlated."""
        return _banded(self.bands, self.steps) if self.bands > 1 else None

    def events(self, steps: int, *, start: int = 0) -> list[Event]:
        """What the steps from `start` up to `steps`, a span, are to an accountant."""
        return [Event(self.chance, self.noise_multiplier, _touched(start, steps, self.bands))]


@dataclass(frozen=True)
class FixedOrder(_EachOnce):
    """Batches of one size in one shuffled order, the same in each epoch, with correlated noise.

    Nothing is claimed for the sampling. Neighbours differ by one example that is replaced by one without gradient.

    Reference: Kalinin et al., "Back to square roots", ICLR 2026, of `bisr`; "DP-λCGD", ICML 2026, of `cgd`; see
        `strategies`.
    """

    steps_per_epoch: int
    """At least 1: the steps from one participation of an example to its next."""
    noise_multiplier: float
    """σ, at least 0: the deviation of a draw over the sensitivity of a step."""
    correlation: Literal["bisr", "cgd"]
    parameter: float
    """The bands of `bisr`, or λ of `cgd`."""

    def __post_init__(self) -> None:
        check_count("FixedOrder", "steps_per_epoch", self.steps_per_epoch)
        check_noise("FixedOrder", self.noise_multiplier)
        if self.correlation not in ("bisr", "cgd"):
            raise ValueError(f"FixedOrder: correlation must be bisr or cgd. Found {self.correlation!r}.")
        if self.correlation == "bisr" and self.parameter != int(self.parameter):
            raise ValueError(f"FixedOrder: the bands of bisr must be a whole number. Found {self.parameter}.")
        _ = self.strategy  # refuses what is out of its range

    @property
    def sampling(self) -> str:
        """How the examples of a step come to be, in words."""
        return (
            f"batches in a fixed order, each example once in {self.steps_per_epoch:,} steps, without amplification; "
            f"noise correlated, {self.correlation} {self.parameter:g}"
        )

    @property
    def strategy(self) -> Toeplitz:
        """How noise is correlated."""
        return bisr(int(self.parameter)) if self.correlation == "bisr" else lambda_cgd(self.parameter)

    def events(self, steps: int, *, start: int = 0) -> list[Event]:
        """What the steps from `start` up to `steps`, a span, are to an accountant."""
        if steps - start > _MOST_CORRELATED:
            raise ValueError(
                f"FixedOrder: at most {_MOST_CORRELATED:,} steps are accounted for. Found {steps - start:,}."
            )
        reach = _sensitivity(self.strategy, steps - start, self.steps_per_epoch)
        return [Event(1.0, self.noise_multiplier / reach, 1)]


Mechanism: TypeAlias = Poisson | Shuffled | BandMF | FixedOrder
"""How batches are sampled and noise is added, as an accountant sees it."""


def check_mechanism(where: str, mechanism: object) -> None:
    """Refuses what is no mechanism, such as a noise multiplier alone.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(mechanism, Mechanism):
        raise TypeError(
            f"{where}: mechanism must say how examples are sampled, too. Found {shown(mechanism)}. "
            "Pass privacy.Poisson(rate, noise_multiplier), Shuffled, BandMF or FixedOrder."
        )


_MOST_CORRELATED = 10**6
"""The sensitivity of so many steps takes a second, and memory for as many numbers."""


def column(strategy: Strategy | None) -> float:
    """The norm of the longest column of C, which the deviation of a draw is multiplied by; 1 where σ is of a draw."""
    return 1.0 if strategy is None or isinstance(strategy, Toeplitz) else strategy.sensitivity(1)


def _touched(start: int, steps: int, length: int) -> int:
    """How many of the stretches of so many steps have a step from `start` up to `steps`."""
    return -(-steps // length) - start // length


@lru_cache(maxsize=64)
def _banded(bands: int, steps: int) -> Strategy:
    return banded(bands, steps)


@lru_cache(maxsize=4096)
def _sensitivity(strategy: Toeplitz, steps: int, separation: int) -> float:
    return strategy.sensitivity(steps, min_separation=separation)


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
