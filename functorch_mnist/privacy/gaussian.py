"""The Gaussian mechanism without sampling, exactly: Gaussian differential privacy (GDP).

n releases of noise multiplier σ are one of μ = √n / σ, for which

    δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ)

Reference: Balle, Wang, "Improving the Gaussian mechanism for differential privacy: analytical calibration and optimal
    denoising", ICML 2018, theorem 8.
"""

import math

import torch


def gaussian_delta(mu: float, epsilon: float) -> float:
    """δ of a Gaussian mechanism of μ at ε.

    Example:
        >>> round(gaussian_delta(1.0, 1.0), 6)
        0.126937
    """
    if mu == 0:
        return 0.0
    first, second = _log_phi(mu / 2 - epsilon / mu), epsilon + _log_phi(-mu / 2 - epsilon / mu)
    return max(0.0, -math.exp(first) * math.expm1(min(0.0, second - first)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε of a Gaussian mechanism of μ at δ: the minimum, rounded up in the last digits.

    Example:
        >>> round(gaussian_epsilon(1.0, 1e-5), 3)
        4.377
    """
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def _log_phi(x: float) -> float:
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))
