"""The privacy loss distribution of the Poisson-subsampled Gaussian, by `dp-accounting` (the `privacy` extra).

The losses of a step are rounded to multiples of an interval h, so that ε is never too small. What the rounding adds to
ε grows with h against the deviation of one step's loss, which is near

    s = min(1 / σ, q √(exp(1 / σ²) - 1))

so h = s / 4 within [1e-7, 0.001], and larger only where one step would have over a quarter of a million points, or
all steps over a million.

Reference: Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, "Connect the dots: tighter discrete approximations of privacy
    loss distributions", PoPETs 2022; neighbours differ by one example added or removed.
"""

import math
from functools import lru_cache
from typing import Any

LEAST_NOISE = 0.05
"""Below it ε is in the hundreds and of no use: it is called infinite."""
_POINTS = 1_000_000
_TAIL = 1e-15
"""Chance of losses that count as infinite."""
_ROUNDING = 1e-13
"""What the rounding of the Fourier transforms may hide of a chance: ten times the most that was found."""
_BLOCK = 1 << 12
"""`self_compose` takes a power of as high an order as there are steps, in whole numbers: more steps go in blocks."""


@lru_cache(maxsize=4096)
def pld_epsilon(rate: float, sigma: float, steps: int, delta: float) -> float:
    """ε at δ of at least one step of rate q and noise multiplier σ: no less than the true one.

    Infinite for a δ up to 1e-13, which the numbers do not resolve.

    Raises:
        ImportError: `dp-accounting` is not installed.

    Example:
        >>> round(pld_epsilon(240 / 60_000, 1.1, 15_000, 1e-5), 2)
        2.31
    """
    if sigma < LEAST_NOISE or delta <= _ROUNDING:
        return math.inf
    one = _one_step(rate, sigma, _interval(rate, sigma, steps))
    blocks, rest = divmod(steps, _BLOCK)
    if not blocks:
        return float(one.self_compose(steps, _TAIL).get_epsilon_for_delta(delta - _ROUNDING))
    all_steps = one.self_compose(_BLOCK, _TAIL / blocks).self_compose(blocks, _TAIL)
    if rest:
        all_steps = all_steps.compose(one.self_compose(rest, _TAIL), _TAIL)
    return float(all_steps.get_epsilon_for_delta(delta - _ROUNDING))


def _interval(q: float, sigma: float, steps: int) -> float:
    """h, the same for nearly equal numbers of steps, so that one step is discretised once."""
    deviation = min(1 / sigma, q * math.sqrt(math.expm1(min(500.0, 1 / sigma / sigma))))
    rounded = 2.0 ** math.ceil(math.log2(steps) / 2)  # √steps or a little more
    return max(1e-7, min(1e-3, deviation / 4), 8 * _largest(q, sigma) / _POINTS, 16 * deviation * rounded / _POINTS)


def _largest(q: float, sigma: float) -> float:
    """The loss at ten deviations, which is beyond what counts."""
    exponent = 10 / sigma + 1 / (2 * sigma * sigma)
    return exponent if q == 1 else math.log1p(q * math.expm1(exponent)) if exponent < 500 else exponent + math.log(q)


@lru_cache(maxsize=32)
def _one_step(rate: float, sigma: float, interval: float) -> Any:
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ImportError as error:
        raise ImportError(
            f"The pld accountant needs dp-accounting. Found: {error}. Install it: "
            "pip install 'functorch-mnist[privacy]', or take the rdp accountant."
        ) from error
    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=interval
    )
