"""The privacy loss distribution (PLD) of Poisson-subsampled Gaussians, composed by `dp-accounting`.

For one release of rate q and noise multiplier σ, with P the output with the example and Q without it, and
z(ε) = 1/2 + σ² log((e^ε - 1 + q) / q), where the loss is ε,

    δ₋(ε) = sup_S P(S) - e^ε Q(S) = (1 - q) Φ(-z/σ) + q Φ((1 - z)/σ) - e^ε Φ(-z/σ)      z = z(ε)
    δ₊(ε) = sup_S Q(S) - e^ε P(S) = Φ(z/σ) - e^ε ((1 - q) Φ(z/σ) + q Φ((z - 1)/σ))      z = z(-ε)

Losses are rounded to multiples of an interval h, so that ε is never too small. What the rounding adds to ε grows with h
against the deviation of one release's loss, which is near

    s = min(1 / σ, q √(exp(1 / σ²) - 1))

so h = s / 4 within [1e-7, 0.001], of the least s where there are several, and larger only where one release would have
over a quarter of a million points, or all of them over a million.

Reference: Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, "Connect the dots: tighter discrete approximations of privacy
    loss distributions", PoPETs 2022; neighbours differ by one example added or removed.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .mechanism import Event

LEAST_NOISE = 0.05
"""Below it ε is in the hundreds and of no use: it is reported as infinite."""
_POINTS = 1_000_000
_TAIL = 1e-15
"""Probability of losses that count as infinite."""
_ROUNDING = 1e-13
"""A bound on the rounding of probabilities by the Fourier transforms: ten times the largest that was measured."""
_BLOCK = 1 << 12
"""`self_compose` takes a power of as high an order as there are steps, in whole numbers: more steps go in blocks."""


@lru_cache(maxsize=4096)
def pld_epsilon(events: tuple[Event, ...], delta: float) -> float:
    """ε at δ of at least one event, composed: no less than the true one.

    Infinite for a δ up to 1e-13, which the numbers do not resolve.

    Raises:
        ImportError: `dp-accounting` is not installed.

    Example:
        >>> round(pld_epsilon((Event(240 / 60_000, 1.1, 15_000),), 1e-5), 2)
        2.31
    """
    if min(event.noise_multiplier for event in events) < LEAST_NOISE or delta <= _ROUNDING:
        return math.inf
    interval = _interval(events)
    total: Any = None
    for event in events:
        part = _self_composed(_release(event.rate, event.noise_multiplier, interval), event.times)
        total = part if total is None else total.compose(part, _TAIL)
    return float(total.get_epsilon_for_delta(delta - _ROUNDING))


@lru_cache(maxsize=256)
def mixture_epsilon(rate: float, sigma: float, most: int, steps: int, delta: float) -> float:
    """ε at δ for a user of at most `most` examples, each of which joins each step independently.

    The number that joins is binomial: the release is a mixture of Gaussians at 0, 1, ..., `most` sensitivities.

    Raises:
        ImportError: `dp-accounting` is not installed.
    """
    if sigma < LEAST_NOISE or delta <= _ROUNDING:
        return math.inf
    chances = [math.comb(most, k) * rate**k * (1 - rate) ** (most - k) for k in range(most + 1)]
    reached = [k for k, chance in enumerate(chances) if chance > 0]
    pld, interval = _package(), _interval((Event(rate, sigma / most, steps),))
    one = pld.privacy_loss_distribution.from_mixture_gaussian_mechanism(
        sigma, reached, [chances[k] for k in reached], value_discretization_interval=interval
    )
    return float(_self_composed(one, steps).get_epsilon_for_delta(delta - _ROUNDING))


def _self_composed(one: Any, count: int) -> Any:
    blocks, rest = divmod(count, _BLOCK)
    if not blocks:
        return one.self_compose(count, _TAIL)
    whole = one.self_compose(_BLOCK, _TAIL / blocks).self_compose(blocks, _TAIL)
    return whole.compose(one.self_compose(rest, _TAIL), _TAIL) if rest else whole


def _interval(events: Sequence[Event]) -> float:
    """h, the same for nearly equal numbers of steps, so that one release is discretised once."""
    deviations = [_deviation(event.rate, event.noise_multiplier) for event in events]
    # √count, rounded up to a power of √2
    rounded = [2.0 ** math.ceil(math.log2(event.times) / 2) for event in events]
    total = math.hypot(*[deviation * root for deviation, root in zip(deviations, rounded, strict=True)])
    largest = max(_largest(event.rate, event.noise_multiplier) for event in events)
    return max(1e-7, min(1e-3, min(deviations) / 4), 8 * largest / _POINTS, 16 * total / _POINTS)


def _deviation(q: float, sigma: float) -> float:
    return min(1 / sigma, q * math.sqrt(math.expm1(min(500.0, 1 / sigma / sigma))))


def _largest(q: float, sigma: float) -> float:
    """The loss at ten deviations, which is beyond what counts."""
    exponent = 10 / sigma + 1 / (2 * sigma * sigma)
    return exponent if q == 1 else math.log1p(q * math.expm1(exponent)) if exponent < 500 else exponent + math.log(q)


@lru_cache(maxsize=32)
def _release(rate: float, sigma: float, interval: float) -> Any:
    """The losses of one release, of either direction."""
    pld = _package()
    directions = pld.privacy_loss_mechanism.AdjacencyType
    both = (directions.REMOVE,) if rate == 1 else (directions.REMOVE, directions.ADD)  # which are then equal
    found = []
    for direction in both:
        mechanism = pld.privacy_loss_mechanism.GaussianPrivacyLoss(sigma, sampling_prob=rate, adjacency_type=direction)
        bounds = mechanism.connect_dots_bounds()
        low, high = math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval)
        losses = torch.arange(low, high + 1, dtype=torch.float64) * interval
        deltas = (removed if direction == directions.REMOVE else added)(losses, rate, sigma)
        found.append(pld.pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, deltas.numpy()))
    return pld.privacy_loss_distribution.PrivacyLossDistribution(*found)


def removed(epsilons: Tensor, q: float, sigma: float) -> Tensor:
    """δ₋ of one release, at each ε; see above.

    Example:
        >>> removed(torch.zeros(1, dtype=torch.float64), 1.0, 2.0)  # 2 Φ(1/4) - 1
        tensor([0.1974], dtype=torch.float64)
    """
    least = math.log1p(-q) if q < 1 else -math.inf
    z = _threshold(epsilons.clamp(min=least), q, sigma)
    upper = (1 - q) * _phi(-z / sigma) + q * _phi((1 - z) / sigma)
    found = upper - (epsilons + torch.special.log_ndtr(-z / sigma)).exp()
    return torch.where(epsilons > least, found, -epsilons.expm1()).clamp(0, 1)


def added(epsilons: Tensor, q: float, sigma: float) -> Tensor:
    """δ₊ of one release, at each ε; see above."""
    most = -math.log1p(-q) if q < 1 else math.inf
    z = _threshold((-epsilons).clamp(min=-most), q, sigma)
    one, other = math.log1p(-q) if q < 1 else -math.inf, math.log(q)
    below = torch.logaddexp(one + torch.special.log_ndtr(z / sigma), other + torch.special.log_ndtr((z - 1) / sigma))
    return torch.where(epsilons < most, _phi(z / sigma) - (epsilons + below).exp(), 0.0).clamp(0, 1)


def _threshold(epsilons: Tensor, q: float, sigma: float) -> Tensor:
    """z: where the loss is ε."""
    large = epsilons > 30
    ratio = torch.log1p(torch.where(large, 0.0, epsilons).expm1() / q)
    return 0.5 + sigma * sigma * torch.where(large, epsilons - math.log(q), ratio)


def _phi(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))  # torch's ndtr loses the digits of its lower tail


def _package() -> Any:
    try:
        from dp_accounting import pld
        from dp_accounting.pld import pld_pmf, privacy_loss_distribution, privacy_loss_mechanism  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"The pld accountant needs dp-accounting. Found: {error}. "
            "Install it with pip install dp-accounting, or take the rdp accountant."
        ) from error
    return pld
