"""Accountants: ε of steps of a mechanism, and the noise or steps that a budget allows.

| accountant | for | method |
|---|---|---|
| `pld` | all | privacy loss distribution (PLD), by `dp-accounting`: the tightest, never below the true ε |
| `rdp` | all | Rényi differential privacy (RDP), improved conversion |
| `rdp-old` | all | Rényi, the conversion that most papers before 2021 report |
| `gaussian` | mechanisms without sampling | Gaussian differential privacy (GDP), exact |

Each composes the mechanism's own events, `Mechanism.events`: for every accountant an epoch of `Shuffled` is one release
without amplification by sampling.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

from ..arguments import check_takes, shown
from .gaussian import gaussian_epsilon
from .mechanism import Event, Mechanism, Poisson, check_count, check_mechanism
from .pld import LEAST_NOISE, mixture_epsilon, pld_epsilon
from .rdp import ORDERS, converted, rdp

Accountant: TypeAlias = Literal["pld", "rdp", "rdp-old", "gaussian"]
"""An accountant: the privacy loss distribution, Rényi divergences with the improved or the old conversion to ε, or the
exact ε of Gaussian steps without sampling."""

MAX_STEPS = 10**8
"""The most that are accounted for."""


def epsilon(mechanism: Mechanism, *, steps: int, delta: float, accountant: Accountant = "pld") -> float:
    """The privacy budget ε that a number of steps spends, at δ.

    Args:
        mechanism: of each step.
        steps: from 0 to `MAX_STEPS`.
        delta: δ in (0, 1).
        accountant: "pld" (tightest), "rdp", "rdp-old" or "gaussian".

    Returns:
        ε, at least 0; 0 for no step; infinite without noise.

    Raises:
        ValueError: a number is out of its range or not finite; the accountant is unknown, or does not apply to this
            sampling.
        TypeError: `mechanism` is none, such as a noise multiplier alone.

    Guarantees: an upper bound on the true ε for neighbours as `mechanism.relation` says.

    Example:
        >>> round(epsilon(Poisson(240 / 60_000, 1.1), steps=15_000, delta=1e-5, accountant="rdp"), 3)
        2.503

    Reference: PLD: Koskela, Jälkö, Honkela, "Computing tight differential privacy guarantees using FFT", AISTATS 2020,
        and Doroshenko et al., PoPETs 2022. RDP: Mironov, "Rényi differential privacy", CSF 2017. GDP: Dong, Roth, Su,
        "Gaussian differential privacy", JRSS B 84, 2022.
    """
    check_mechanism("epsilon", mechanism)
    _check_steps("epsilon", steps, least=0)
    return composed(mechanism.events(steps) if steps else [], delta=delta, accountant=accountant)


def composed(events: Sequence[Event], *, delta: float, accountant: Accountant = "pld") -> float:
    """ε of the composition of several events, at δ.

    Args:
        events: from `Mechanism.events`, of one mechanism or of several.
        delta: δ in (0, 1).
        accountant: as in `epsilon`.

    Returns:
        ε, at least 0; 0 for no event; infinite where one has no noise.

    Raises:
        ValueError: δ is out of its range; the accountant is unknown, or is `gaussian` and an event is sampled.
        TypeError: one is no `Event`, such as a mechanism.

    Example:
        >>> round(composed([Event(1.0, 10.0, 3), Event(1.0, 5.0, 1)], delta=1e-5, accountant="gaussian"), 3)
        0.986
    """
    _check_delta(delta)
    if isinstance(events, Event) or not all(isinstance(event, Event) for event in events):
        kinds = shown(events) if isinstance(events, Event) else [shown(event) for event in events]
        raise TypeError(f"composed: events must be privacy.Events. Found {kinds}. Pass mechanism.events(steps)?")
    _check_accountant(accountant, events)
    counts: Counter[tuple[float, float]] = Counter()
    for rate, sigma, count in events:
        counts[rate, sigma] += count
    each = tuple(Event(*event, count) for event, count in sorted(counts.items()))
    if not each:
        return 0.0
    if min(event.noise_multiplier for event in each) == 0:
        return math.inf
    if accountant == "gaussian":
        return gaussian_epsilon(math.hypot(*[math.sqrt(count) / sigma for _, sigma, count in each]), delta)
    if accountant == "pld":
        return pld_epsilon(each, delta)
    moments = [[count * divergence for divergence in rdp(rate, sigma)] for rate, sigma, count in each]
    divergences = [sum(of_order) for of_order in zip(*moments, strict=True)]
    return converted(divergences, ORDERS, delta=delta, conversion="old" if accountant == "rdp-old" else "improved")


def user_epsilon(mechanism: Poisson, *, examples_per_user: int, steps: int, delta: float) -> float:
    """User-level ε, where examples are sampled and clipped one by one.

    Neighbours differ by a user of at most `examples_per_user` examples. How many of them join a step is binomial, so a
    step is a mixture of Gaussians. Where users are sampled and clipped as a whole, `Poisson(unit="user")`, their
    account is `epsilon`.

    Args:
        mechanism: Poisson sampling of examples.
        examples_per_user: the most examples of any user, at least 1.
        steps: from 0 to `MAX_STEPS`.
        delta: δ in (0, 1).

    Returns:
        ε by PLD, at least 0; infinite without noise.

    Raises:
        ValueError: a number is out of its range, or the mechanism does not sample examples by Poisson sampling.

    Example:
        >>> one = Poisson(0.01, 2.0)
        >>> user_epsilon(one, examples_per_user=1, steps=100, delta=1e-5) < epsilon(one, steps=100, delta=1e-5) + 1e-3
        True

    Reference: Charles et al., "Fine-tuning large language models with user-level differential privacy", arXiv
        2407.07737, section 3.
    """
    if not isinstance(mechanism, Poisson) or mechanism.unit != "example":
        raise ValueError(f"user_epsilon: examples must be sampled by Poisson sampling. Found {mechanism}.")
    check_count("user_epsilon", "examples_per_user", examples_per_user)
    _check_steps("user_epsilon", steps, least=0)
    _check_delta(delta)
    if steps == 0:
        return 0.0
    if mechanism.noise_multiplier == 0:
        return math.inf
    return mixture_epsilon(mechanism.rate, mechanism.noise_multiplier, examples_per_user, steps, delta)


def calibrated(
    make: Callable[[float], Mechanism], *, budget: float, delta: float, steps: int, accountant: Accountant = "pld"
) -> float:
    """The least noise multiplier σ that spends at most a budget ε.

    Args:
        make: `make(sigma) -> Mechanism`, such as `lambda sigma: Poisson(rate, sigma)`.
        budget: ε, above 0 and finite.
        delta: δ in (0, 1).
        steps: from 1 to `MAX_STEPS`.
        accountant: as in `epsilon`.

    Returns:
        σ, four digits, rounded up.

    Raises:
        ValueError: a number is out of its range, or no σ up to 10⁶ is enough.
        TypeError: `make` is no function of σ, or returns no mechanism.

    Guarantees: `epsilon(make(σ), …)` is at most the budget.

    Example:
        >>> from functorch_mnist.privacy import Shuffled
        >>> calibrated(lambda sigma: Shuffled(10, sigma), budget=1.0, delta=1e-5, steps=10, accountant="gaussian")
        3.731
    """
    _check_budget("calibrated", budget)
    _check_steps("calibrated", steps, least=1)

    check_takes(
        "calibrated", "make", make, ["noise multiplier"],
        "Pass a function of the noise multiplier that returns a mechanism: lambda sigma: privacy.Poisson(rate, sigma).",
    )  # fmt: skip

    def spent(sigma: float) -> float:
        return epsilon(make(sigma), steps=steps, delta=delta, accountant=accountant)

    high, gap = 1.0, _gap(spent(1.0), budget)
    while gap > 0:
        high *= 2
        if high > 1e6:
            raise ValueError(f"calibrated: ε = {budget} at δ = {delta} must be possible. Found no noise up to 1e6.")
        gap = _gap(spent(high), budget)
    low, above = high / 2, _gap(spent(high / 2), budget)
    while low > LEAST_NOISE and above <= 0:
        low, high, gap = low / 2, low, above
        above = _gap(spent(low), budget)
    moved = ""
    while _next(low) < high:  # the secant of log ε over log σ, then the neighbouring numbers
        secant = above / (above - gap) if math.isfinite(above) and above > 0 else 0.5
        middle = min(max(_rounded_up(low * (high / low) ** min(max(secant, 0.0), 1.0)), _next(low)), _previous(high))
        there = _gap(spent(middle), budget)
        if there > 0:
            low, above, gap = middle, there, gap / 2 if moved == "low" else gap
            moved = "low"
        else:
            high, gap, above = middle, there, above / 2 if moved == "high" else above
            moved = "high"
    return _rounded_up(high)


def max_steps(mechanism: Mechanism, *, budget: float, delta: float, accountant: Accountant = "pld") -> int:
    """The most steps that spend at most a budget ε.

    Args:
        mechanism: of each step.
        budget: ε, above 0 and finite.
        delta: δ in (0, 1).
        accountant: as in `epsilon`.

    Returns:
        The number of steps, from 0; `MAX_STEPS` where the budget lasts longer.

    Raises:
        ValueError: a number is out of its range.
        TypeError: `mechanism` is none.

    Example:
        >>> from functorch_mnist.privacy import Shuffled
        >>> max_steps(Shuffled(100, 4.0), budget=1.0, delta=1e-5, accountant="gaussian")
        100
    """
    check_mechanism("max_steps", mechanism)
    _check_budget("max_steps", budget)

    def enough(steps: int) -> bool:
        return epsilon(mechanism, steps=steps, delta=delta, accountant=accountant) <= budget

    low, high = 0, 1
    while enough(high):
        if high == MAX_STEPS:
            return MAX_STEPS
        low, high = high, min(2 * high, MAX_STEPS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def epsilon_curve(
    mechanism: Mechanism, *, steps: Sequence[int], delta: float, accountant: Accountant = "pld"
) -> list[float]:
    """ε after each of several numbers of steps.

    Args:
        mechanism: of each step.
        steps: numbers of steps, each from 0 to `MAX_STEPS`.
        delta: δ in (0, 1).
        accountant: as in `epsilon`.

    Returns:
        ε of each, in the same order.

    Raises:
        ValueError, TypeError: as in `epsilon`.

    Example:
        >>> from functorch_mnist.privacy import Shuffled
        >>> [round(e, 2) for e in epsilon_curve(Shuffled(9, 4.0), steps=[0, 9], delta=1e-5, accountant="gaussian")]
        [0.0, 0.93]
    """
    return [epsilon(mechanism, steps=count, delta=delta, accountant=accountant) for count in steps]


def _gap(spent: float, budget: float) -> float:
    """log of ε over the budget: above 0 where it is overspent."""
    return math.log(spent / budget) if spent > 0 else -100.0


def _next(value: float) -> float:
    """The next number of four digits."""
    return _rounded_up(value * (1 + 1e-7))


def _previous(value: float) -> float:
    """The number of four digits before."""
    unit = 10.0 ** (math.floor(math.log10(value * (1 - 1e-7))) - 3)
    return float(f"{math.floor(value * (1 - 1e-7) / unit) * unit:.4g}")


def _rounded_up(value: float) -> float:
    """Four digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.4g}")


def _check_accountant(accountant: str, events: Sequence[Event]) -> None:
    if accountant not in get_args(Accountant):
        raise ValueError(f"epsilon: the accountant must be of {', '.join(get_args(Accountant))}. Found {accountant!r}.")
    sampled = [event for event in events if event.rate < 1]
    if accountant == "gaussian" and sampled:
        raise ValueError(
            f"epsilon: gaussian must be of releases without sampling. Found {sampled[0]}. The others, pld, rdp and "
            "rdp-old, count sampled releases."
        )


def _check_budget(where: str, budget: float) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= sys.float_info.max:
        raise ValueError(f"{where}: the budget ε must be a number above 0 and finite. Found {budget}.")


def _check_delta(delta: float) -> None:
    if isinstance(delta, bool) or not isinstance(delta, (int, float)) or not 0 < delta < 1:
        raise ValueError(f"epsilon: δ must be a number above 0 and below 1. Found {delta}.")


def _check_steps(where: str, steps: int, *, least: int) -> None:
    if type(steps) is not int or not least <= steps <= MAX_STEPS:
        raise ValueError(f"{where}: steps must be a whole number from {least} to {MAX_STEPS:,}. Found {steps}.")
