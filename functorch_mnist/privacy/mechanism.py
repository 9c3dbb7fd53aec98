"""Mechanisms: how a step samples, how much noise it adds, and which data sets are neighbours.

A mechanism is the only source of these numbers: the private step is made from it, and the accountants read the same
value. It reports what it spends as Poisson-subsampled Gaussians (`events`):

    Poisson      each step is one, of rate q: DP-SGD
    Shuffled     each epoch is one, of rate 1: no amplification by sampling is claimed
    BandMF       b steps are one, of rate b q: noise is correlated within them, and each example may join one of them
    FixedOrder   all steps are one, of rate 1: noise is correlated over all of them

A span of steps has one secret. A run that is resumed with a new secret begins a new span: an epoch, a block of b steps
or a whole run that is divided between two spans counts in both.
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
    """A number of independent releases of a Poisson-subsampled Gaussian, as accountants compose them."""

    rate: float
    """The sampling rate q in (0, 1]."""
    noise_multiplier: float
    """σ, at least 0: the standard deviation of the noise over the sensitivity."""
    times: int
    """The number of releases, at least 1."""


@dataclass(frozen=True)
class Poisson:
    """DP-SGD's Poisson sampling: each example, or each user, joins each step independently with probability q.

    Raises:
        ValueError: a number is out of its range or not finite, or the unit is unknown.
        TypeError: a number is none.

    Example:
        >>> Poisson(rate=256 / 60_000, noise_multiplier=1.1).events(100)
        [Event(rate=0.004266666666666667, noise_multiplier=1.1, times=100)]

    Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016.
    """

    rate: float
    """q in (0, 1]: the probability to join a step."""
    noise_multiplier: float
    """σ, at least 0: the standard deviation of the noise over the sensitivity of all that a step releases. At 0, ε is
    infinite."""
    unit: Unit = "example"
    """What is sampled, and by which neighbouring data sets differ: "example" or "user"."""

    def __post_init__(self) -> None:
        check_number("Poisson", "rate", self.rate)
        check_noise("Poisson", self.noise_multiplier)
        if self.rate > 1:
            raise ValueError(f"Poisson: rate must be above 0 and at most 1. Found {self.rate}.")
        if self.unit not in get_args(Unit):
            raise ValueError(f"Poisson: unit must be of {', '.join(get_args(Unit))}. Found {self.unit!r}.")

    @property
    def relation(self) -> str:
        """Which data sets are neighbours, in words. Both have the divisor q N of sums: N is public."""
        return f"one {self.unit} added or removed, their number public"

    @property
    def sampling(self) -> str:
        """How the examples of a step are sampled, in words."""
        return f"Poisson, each {self.unit} with a chance of {self.rate:.6g} in each step"

    @property
    def sampling_rate(self) -> float:
        """The expected fraction of examples, or users, in a step: q."""
        return self.rate

    @property
    def strategy(self) -> Strategy | None:
        """The correlation of the noise over steps: none."""
        return None

    def events(self, steps: int, *, start: int = 0) -> list[Event]:
        """The releases of a span of steps, for an accountant.

        Args:
            steps: the span's end, exclusive.
            start: its first step.
        """
        return [Event(self.rate, self.noise_multiplier, steps - start)]


class _EachOnce:
    """The common part of mechanisms whose batches take each example once per epoch, without amplification."""

    steps_per_epoch: int
    unit: ClassVar[Unit] = "example"
    """What neighbouring data sets differ by."""
    relation: ClassVar[str] = "one example replaced by one without gradient"
    """Which data sets are neighbours, in words."""

    @property
    def sampling_rate(self) -> float:
        """The fraction of the examples in a step: 1 / steps_per_epoch."""
        return 1 / self.steps_per_epoch


@dataclass(frozen=True)
class Shuffled(_EachOnce):
    """Shuffled batches of one size: each example is in one batch of each epoch.

    No amplification by sampling is claimed: an epoch is one Gaussian release. Neighbours differ by one example that is
    replaced by one without gradient.

    Raises:
        ValueError: a number is out of its range or not finite.
        TypeError: a number is none.

    Example:
        >>> Shuffled(steps_per_epoch=10, noise_multiplier=4.0).events(25)
        [Event(rate=1.0, noise_multiplier=4.0, times=3)]

    Reference: why shuffling must not be accounted as Poisson sampling: Chua et al., "How private are DP-SGD
        implementations?", ICML 2024.
    """

    steps_per_epoch: int
    """Batches of an epoch, at least 1."""
    noise_multiplier: float
    """σ, at least 0: the standard deviation of the noise over the sensitivity of all that a step releases. At 0, ε is
    infinite."""

    def __post_init__(self) -> None:
        check_count("Shuffled", "steps_per_epoch", self.steps_per_epoch)
        check_noise("Shuffled", self.noise_multiplier)

    @property
    def sampling(self) -> str:
        """How the examples of a step are sampled, in words."""
        return f"shuffled batches, each example once in {self.steps_per_epoch:,} steps, without amplification"

    @property
    def strategy(self) -> Strategy | None:
        """The correlation of the noise over steps: none."""
        return None

    def events(self, steps: int, *, start: int = 0) -> list[Event]:
        """The releases of a span of steps, for an accountant.

        Args:
            steps: the span's end, exclusive.
            start: its first step.
        """
        return [Event(1.0, self.noise_multiplier, _touched(start, steps, self.steps_per_epoch))]


@dataclass(frozen=True)
class BandMF:
    """Banded matrix factorisation (BandMF) with cyclic Poisson sampling: DP-MF with amplification.

    Each example is assigned to one of b groups at random. Step t takes each example of group t mod b independently with
    probability b q. The strategy is block diagonal, `banded`, so a step needs the noise draws of its block alone.

    Raises:
        ValueError: a number is out of its range, or the bands are above 1 / rate or above the steps.
        TypeError: a number is none.

    Example:
        >>> BandMF(rate=0.01, noise_multiplier=1.0, bands=4, steps=100).events(100)
        [Event(rate=0.04, noise_multiplier=1.0, times=25)]

    Reference: Choquette-Choo et al., "(Amplified) banded matrix factorization: a unified approach to private training",
        NeurIPS 2023, theorem 4.
    """

    rate: float
    """q in (0, 1 / b]: the expected fraction of the examples in a step."""
    noise_multiplier: float
    """σ, at least 0: the standard deviation of a noise draw, over the sensitivity of a step times the largest column
    norm of C."""
    bands: int
    """b, at least 1; at 1 it is DP-SGD."""
    steps: int
    """n, at least b: the number of steps for which the strategy has the least error. More or fewer are as private."""

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
        """b q: the probability that an example of the step's group joins."""
        return self.bands * self.rate

    @property
    def unit(self) -> Unit:
        """What neighbouring data sets differ by."""
        return "example"

    @property
    def relation(self) -> str:
        """Which data sets are neighbours, in words."""
        return "one example added or removed, their number public"

    @property
    def sampling(self) -> str:
        """How the examples of a step are sampled, in words."""
        return (
            f"cyclic Poisson, each example with a chance of {self.chance:.6g} in every {self.bands}th step; noise "
            f"correlated in {self.bands} bands"
        )

    @property
    def sampling_rate(self) -> float:
        """The expected fraction of the examples in a step: q."""
        return self.rate

    @property
    def strategy(self) -> Strategy | None:
        """The correlation of the noise over steps."""
        return _banded(self.bands, self.steps) if self.bands > 1 else None

    def events(self, steps: int, *, start: int = 0) -> list[Event]:
        """The releases of a span of steps, for an accountant.

        Args:
            steps: the span's end, exclusive.
            start: its first step.
        """
        return [Event(self.chance, self.noise_multiplier, _touched(start, steps, self.bands))]


@dataclass(frozen=True)
class FixedOrder(_EachOnce):
    """Batches of one size in one shuffled order, the same in each epoch, with noise correlated by BISR or λ-CGD.

    No amplification by sampling is claimed. Neighbours differ by one example that is replaced by one without gradient.

    Raises:
        ValueError: a number is out of its range, or the correlation is unknown.
        TypeError: a number is none.

    Example:
        >>> round(FixedOrder(10, 4.0, "cgd", 0.5).events(10)[0].noise_multiplier, 3)
        3.464

    Reference: BISR: Kalinin et al., "Back to square roots", ICLR 2026. λ-CGD: Kalinin et al., "DP-λCGD", ICML 2026. See
        `bisr` and `lambda_cgd`.
    """

    steps_per_epoch: int
    """At least 1: the steps between two participations of an example."""
    noise_multiplier: float
    """σ, at least 0: the standard deviation of a noise draw over the sensitivity of a step."""
    correlation: Literal["bisr", "cgd"]
    """The strategy, `bisr` or `lambda_cgd`."""
    parameter: float
    """The bands of `bisr`, at least 1, or λ of `cgd`, in [0, 1)."""

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
        """How the examples of a step are sampled, in words."""
        return (
            f"batches in a fixed order, each example once in {self.steps_per_epoch:,} steps, without amplification; "
            f"noise correlated, {self.correlation} {self.parameter:g}"
        )

    @property
    def strategy(self) -> Toeplitz:
        """The correlation of the noise over steps."""
        return bisr(int(self.parameter)) if self.correlation == "bisr" else lambda_cgd(self.parameter)

    def events(self, steps: int, *, start: int = 0) -> list[Event]:
        """The releases of a span of steps, for an accountant.

        Args:
            steps: the span's end, exclusive.
            start: its first step.
        """
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
"""The sensitivity of a million steps takes a second, and memory for a million numbers."""


def column(strategy: Strategy | None) -> float:
    """The factor of a draw's deviation: the largest column norm of C, or 1 where σ is that of a draw."""
    return 1.0 if strategy is None or isinstance(strategy, Toeplitz) else strategy.sensitivity(1)


def _touched(start: int, steps: int, length: int) -> int:
    """How many blocks of `length` steps have a step in [start, steps)."""
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
