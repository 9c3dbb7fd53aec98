"""The privacy loss distribution of the Poisson-subsampled Gaussian, by `dp-accounting` (the `privacy` extra).

The losses of a step are rounded to multiples of an interval h, so that ε is never too small. What the rounding adds to
ε grows with h against the deviation of one step's loss, which is near

    s = min(1 / σ, q √(exp(1 / σ²) - 1))

so h = min(0.001, s / 4), and larger only where one step would have over a quarter of a million points, or all steps over a million.

Reference: Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, "Connect the dots: tighter discrete approximations of privacy
    loss distributions", PoPETs 2022; neighbours differ by one example added or removed.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .mechanism import Poisson

LEAST_NOISE = 0.05
"""Below it ε is in the hundreds and of no use: it is called infinite."""
_POINTS = 1_000_000
_BLOCK = 1 << 12
_MANY = 1 << 17
"""From so many steps on they are composed in blocks: `self_compose` takes a power of that order in whole numbers."""


def pld_epsilon(parts: Sequence[tuple[Poisson, int]], *, delta: float) -> float:
    """ε at δ of some steps of each of some mechanisms: at least the true one.

    Args:
        parts: mechanisms and how many steps each makes, at least 0.
        delta: δ in (0, 1).

    Raises:
        ImportError: `dp-accounting` is not installed.
    """
    made = [(mechanism, steps) for mechanism, steps in parts if steps]
    if any(mechanism.noise_multiplier < LEAST_NOISE for mechanism, _ in made):
        return math.inf
    if not made:
        return 0.0
    interval = min(_interval(mechanism, steps) for mechanism, steps in made)  # one grid, or they do not compose
    first, *others = (_composed(_one_step(mechanism, interval), steps) for mechanism, steps in made)
    for other in others:
        first = first.compose(other, tail_mass_truncation=1e-15)
    return float(first.get_epsilon_for_delta(delta))


def _interval(mechanism: Poisson, steps: int) -> float:
    """h, the same for nearly equal numbers of steps, so that one step is discretised once."""
    q, sigma = mechanism.rate, mechanism.noise_multiplier
    deviation = min(1 / sigma, q * math.sqrt(math.expm1(min(500.0, 1 / sigma / sigma))))
    largest = _largest(q, sigma)
    rounded = 2.0 ** math.ceil(math.log2(steps) / 2)  # √steps or a little more
    return max(min(1e-3, deviation / 4), 8 * largest / _POINTS, 16 * deviation * rounded / _POINTS)


def _largest(q: float, sigma: float) -> float:
    """The loss at ten deviations, which is beyond what counts."""
    exponent = 10 / sigma + 1 / (2 * sigma * sigma)
    return exponent if q == 1 else math.log1p(q * math.expm1(exponent)) if exponent < 500 else exponent + math.log(q)


@lru_cache(maxsize=32)
def _one_step(mechanism: Poisson, interval: float) -> Any:
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ImportError as error:
        raise ImportError(
            f"The pld accountant needs dp-accounting. Found: {error}. Install it: "
            "pip install 'functorch-mnist[privacy]', or take the rdp accountant."
        ) from error
    return privacy_loss_distribution.from_gaussian_mechanism(
        mechanism.noise_multiplier, sampling_prob=mechanism.rate, value_discretization_interval=interval
    )


def _composed(one: Any, steps: int) -> Any:
    if steps < _MANY:
        return one.self_compose(steps)
    blocks, rest = divmod(steps, _BLOCK)
    whole = one.self_compose(_BLOCK).self_compose(blocks)
    return whole.compose(one.self_compose(rest), tail_mass_truncation=1e-15) if rest else whole
