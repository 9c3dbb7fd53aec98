"""Rényi differential privacy (RDP) of the Poisson-subsampled Gaussian: the moments accountant, without other packages.

For neighbours that differ by one example added or removed, a step of rate q and noise multiplier σ has, at order α,

    rdp(α) = log A / (α - 1),    A = E_{z ~ N(0, σ²)} [((1 - q) + q exp((2z - 1) / 2σ²))^α]

    A = Σ_{k=0}^α C(α, k) (1 - q)^{α-k} q^k exp((k² - k) / 2σ²)     for whole α; otherwise, j = α - k,
    A = Σ_{k=0}^∞ C(α, k) [ (1 - q)^j q^k exp((k² - k) / 2σ²) Φ((z₀ - k) / σ)
                          + (1 - q)^k q^j exp((j² - j) / 2σ²) Φ((j - z₀) / σ) ],      z₀ = σ² log(1/q - 1) + 1/2

and steps add up. To (ε, δ), the least over α of

    old         n rdp(α) + log(1/δ) / (α - 1)
    improved    n rdp(α) + log((α - 1) / α) - (log δ + log α) / (α - 1)

Reference: Mironov, Talwar, Zhang, "Rényi differential privacy of the sampled Gaussian mechanism", arXiv 1908.10530,
    section 3.3; conversions: Mironov, "Rényi differential privacy", CSF 2017, proposition 3; Canonne, Kamath, Steinke,
    "The discrete Gaussian for differential privacy", NeurIPS 2020, proposition 12.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeAlias

import torch

Conversion: TypeAlias = Literal["old", "improved"]

ORDERS: tuple[float, ...] = (
    *(1 + x / 10 for x in range(1, 110)),
    *(float(x) for x in range(12, 64)),
    *(float(x) for x in (72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024)),
)
"""Orders α over which ε is minimised: those of Opacus, 1.1 to 10.9 and 12 to 63, and larger ones for small ε."""


def rdp(rate: float, noise_multiplier: float, orders: Sequence[float] = ORDERS) -> list[float]:
    """The Rényi divergence of one step, at each order.

    Args:
        rate: q in (0, 1].
        noise_multiplier: σ, above 0.
        orders: α, above 1.

    Returns:
        At least 0 each; infinite where floats overflow, so that no account underestimates.

    Example:
        >>> rdp(1.0, 2.0, [2.0])
        [0.25]
    """
    if rate == 1:
        return [order / 2 / noise_multiplier / noise_multiplier for order in orders]
    return [_log_moment(rate, noise_multiplier, order) / (order - 1) for order in orders]


def converted(divergences: Sequence[float], orders: Sequence[float], *, delta: float, conversion: Conversion) -> float:
    """ε at δ from Rényi divergences at some orders: the minimum over orders, at least 0.

    Example:
        >>> round(converted([0.25], [2.0], delta=0.1, conversion="old"), 6)  # 1/4 + log 10
        2.552585
    """

    def at(divergence: float, order: float) -> float:
        if conversion == "old":
            return divergence - math.log(delta) / (order - 1)
        return divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)

    return max(0.0, min(at(divergence, order) for divergence, order in zip(divergences, orders, strict=True)))


@lru_cache(maxsize=65536)
def _log_moment(q: float, sigma: float, order: float) -> float:
    """log A, infinite where it is not a number."""
    whole = order == int(order)
    value = _log_moment_whole(q, sigma, int(order)) if whole else _log_moment_between(q, sigma, order)
    return math.inf if math.isnan(value) else max(0.0, value)


def _log_moment_whole(q: float, sigma: float, order: int) -> float:
    k = torch.arange(order + 1, dtype=torch.float64)
    terms = log_binomial(order, k) + k * math.log(q) + (order - k) * math.log1p(-q) + (k * k - k) / 2 / sigma / sigma
    return terms.logsumexp(0).item()


def _log_moment_between(q: float, sigma: float, order: float) -> float:
    """Both series, until their terms no longer count; NaN where one is not a number.

    They alternate in the end, so what is left out is at most the last term, which is added once more.
    """
    z0 = sigma * sigma * (math.log1p(-q) - math.log(q)) + 0.5
    count = 64
    while True:
        k = torch.arange(count, dtype=torch.float64)
        j = order - k
        log_size, sign = log_binomial(order, k), _sign_of_binomial(order, k)
        below = k * math.log(q) + j * math.log1p(-q) + (k * k - k) / 2 / sigma / sigma + _log_phi((z0 - k) / sigma)
        above = j * math.log(q) + k * math.log1p(-q) + (j * j - j) / 2 / sigma / sigma + _log_phi((j - z0) / sigma)
        terms = log_size + torch.stack([below, above])
        largest = terms.max()
        if not largest.isfinite():
            return math.nan
        total = (sign * (terms - largest).exp()).sum() + (terms[:, -1] - largest).exp().sum()
        if terms[:, -1].max() < largest - 40 or count >= 1 << 14:
            return (largest + total.log()).item()
        count *= 2


def log_binomial(n: float, k: torch.Tensor) -> torch.Tensor:
    """log |C(n, k)|."""
    return math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _sign_of_binomial(n: float, k: torch.Tensor) -> torch.Tensor:
    """The sign of C(n, k), n not whole: it alternates once k is above n + 1."""
    beyond = (k - math.floor(n) - 1).clamp(min=0)
    return 1 - 2 * (beyond % 2)


def _log_phi(x: torch.Tensor) -> torch.Tensor:
    """log Φ(x)."""
    log_phi: torch.Tensor = torch.special.log_ndtr(x)
    return log_phi
