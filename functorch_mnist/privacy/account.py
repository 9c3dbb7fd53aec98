"""What steps of a mechanism spend, and what may be spent on them.

| accountant | of | how |
|---|---|---|
| `pld` | `Poisson` | privacy loss distribution, by `dp-accounting`: the tightest, never below the true ε |
| `rdp` | `Poisson` | Rényi, improved conversion |
| `rdp-old` | `Poisson` | Rényi, the conversion that most papers before 2021 report |
| `gaussian` | `Shuffled` | exact, without amplification by sampling: an epoch is one release |

An accountant of one kind of sampling refuses the other: an account of draws that did not happen is none.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from .gaussian import gaussian_epsilon
from .mechanism import Mechanism, Poisson, Shuffled
from .pld import LEAST_NOISE, pld_epsilon
from .rdp import ORDERS, converted, rdp

Accountant: TypeAlias = Literal["pld", "rdp", "rdp-old", "gaussian"]

MOST_STEPS = 10**8
"""The most that are accounted for."""


def epsilon(mechanism: Mechanism, *, steps: int, delta: float, accountant: Accountant = "pld") -> float:
    """ε of so many steps, at δ.

    Args:
        mechanism: of each step.
        steps: at least 0, at most `MOST_STEPS`.
        delta: δ in (0, 1).
        accountant: see above.

    Returns:
        At least 0; 0 for no step.

    Raises:
        ValueError: a number is out of its range or not finite; the accountant is unknown, or not of this mechanism.
        ImportError: `dp-accounting` is not installed.

    Example:
        >>> round(epsilon(Poisson(240 / 60_000, 1.1), steps=15_000, delta=1e-5, accountant="rdp"), 3)
        2.503
    """
    _check_steps("epsilon", steps, least=0)
    _check_delta(delta)
    _check_accountant(accountant, mechanism)
    if steps == 0:
        return 0.0
    if isinstance(mechanism, Shuffled):
        releases = -(-steps // mechanism.steps_per_epoch)
        return gaussian_epsilon(math.sqrt(releases) / mechanism.noise_multiplier, delta)
    if accountant == "pld":
        return pld_epsilon(mechanism.rate, mechanism.noise_multiplier, steps, delta)
    divergences = [steps * divergence for divergence in rdp(mechanism.rate, mechanism.noise_multiplier)]
    return converted(divergences, ORDERS, delta=delta, conversion="old" if accountant == "rdp-old" else "improved")


def calibrated(
    make: Callable[[float], Mechanism], *, budget: float, delta: float, steps: int, accountant: Accountant = "pld"
) -> float:
    """The least noise multiplier σ that spends at most `budget` in so many steps: four digits, rounded up.

    Args:
        make: the mechanism of a noise multiplier.
        budget: ε, above 0 and finite.
        delta: δ in (0, 1).
        steps: at least 1.
        accountant: as in `epsilon`.

    Raises:
        ValueError: a number is out of its range, or no σ up to 10⁶ is enough.

    Example:
        >>> calibrated(lambda sigma: Shuffled(10, sigma), budget=1.0, delta=1e-5, steps=10, accountant="gaussian")
        3.731
    """
    _check_budget("calibrated", budget)
    _check_steps("calibrated", steps, least=1)

    def spent(sigma: float) -> float:
        return epsilon(make(sigma), steps=steps, delta=delta, accountant=accountant)

    high = 1.0
    while spent(high) > budget:
        high *= 2
        if high > 1e6:
            raise ValueError(f"calibrated: ε = {budget} at δ = {delta} must be possible. Found no noise up to 1e6.")
    low = high / 2
    while low > LEAST_NOISE and spent(low) <= budget:
        low, high = low / 2, low
    while high - low > 1e-5 * high and _rounded_up(low) != _rounded_up(high):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return _rounded_up(high)


def most_steps(mechanism: Mechanism, *, budget: float, delta: float, accountant: Accountant = "pld") -> int:
    """The most steps that spend at most ε = `budget`; `MOST_STEPS` where there is no end to them before.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> most_steps(Shuffled(100, 4.0), budget=1.0, delta=1e-5, accountant="gaussian")
        100
    """
    _check_budget("most_steps", budget)

    def enough(steps: int) -> bool:
        return epsilon(mechanism, steps=steps, delta=delta, accountant=accountant) <= budget

    low, high = 0, 1
    while enough(high):
        if high == MOST_STEPS:
            return MOST_STEPS
        low, high = high, min(2 * high, MOST_STEPS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def curve(mechanism: Mechanism, *, steps: Sequence[int], delta: float, accountant: Accountant = "pld") -> list[float]:
    """ε after each of some numbers of steps."""
    return [epsilon(mechanism, steps=count, delta=delta, accountant=accountant) for count in steps]


@dataclass(frozen=True)
class Ledger:
    """What has really run, as it is kept with a run's parameters."""

    mechanism: Mechanism
    clipping: str
    """The rule, as it shows itself."""
    data: str
    """A name of the examples' numbers: another data set has another."""
    steps: int
    """Made so far."""

    def to_json(self) -> dict[str, Any]:
        """The ledger as JSON values; `from_json` is the way back, bit for bit."""
        return {**asdict(self), "mechanism": {"kind": type(self.mechanism).__name__, **asdict(self.mechanism)}}

    @staticmethod
    def from_json(values: Any) -> "Ledger":
        """The ledger that `to_json` wrote.

        Raises:
            ValueError: it is none.
        """
        try:
            given = dict(values["mechanism"])
            kinds: dict[str, Callable[..., Mechanism]] = {"Poisson": Poisson, "Shuffled": Shuffled}
            mechanism = kinds[given.pop("kind")](**given)
            clipping, examples, steps = values["clipping"], values["data"], values["steps"]
            kinds_of = [type(clipping), type(examples), type(steps)]
            if kinds_of != [str, str, int] or steps < 0 or len(values) != 4:
                raise ValueError(f"found {values}")
            return Ledger(mechanism, clipping, examples, steps)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Ledger: JSON must be what to_json makes. Found: {error!r:.200}.") from error


def _rounded_up(value: float) -> float:
    """Four digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.4g}")


def _check_accountant(accountant: str, mechanism: Mechanism) -> None:
    if accountant not in get_args(Accountant):
        raise ValueError(f"epsilon: the accountant must be of {', '.join(get_args(Accountant))}. Found {accountant!r}.")
    if (accountant == "gaussian") != isinstance(mechanism, Shuffled):
        raise ValueError(
            f"epsilon: {accountant} must be of the sampling that ran. Found {type(mechanism).__name__}. "
            "Only Shuffled takes gaussian, and it takes no other: a shuffle is not amplified as Poisson draws are."
        )


def _check_budget(where: str, budget: float) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= sys.float_info.max:
        raise ValueError(f"{where}: the budget ε must be a number above 0 and finite. Found {budget}.")


def _check_delta(delta: float) -> None:
    if isinstance(delta, bool) or not isinstance(delta, (int, float)) or not 0 < delta < 1:
        raise ValueError(f"epsilon: δ must be a number above 0 and below 1. Found {delta}.")


def _check_steps(where: str, steps: int, *, least: int) -> None:
    if type(steps) is not int or not least <= steps <= MOST_STEPS:
        raise ValueError(f"{where}: steps must be a whole number from {least} to {MOST_STEPS:,}. Found {steps}.")
