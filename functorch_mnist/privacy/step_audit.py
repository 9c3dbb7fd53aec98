"""Auditing a step: an empirical lower bound on the ε of code, by a membership inference attack on it.

The attacker sees all that T steps release of one of two sets of examples, m rows of gradient -v and, in the second set,
a canary of gradient v that joins every step. All are far longer than the clipping norm. Correct code with noise
multiplier σ is then a Gaussian mechanism of μ = √T / σ, and no test between the two sets has error rates (α, β) with

    Φ⁻¹(1 - α) - Φ⁻¹(β) > μ

So rates that do, with their statistical uncertainty, prove a fault. With the sampling rates of training the same attack
has no power: its μ is about q √T / σ.

This tests a single step, many times, in seconds and at any σ. `one_run` complements it: it audits a whole training run,
with sampling and all steps, from the coins of many canaries at once; it shows a part of ε, of that run alone.

Reference: Nasr et al., "Tight auditing of differentially private machine learning", USENIX Security 2023, section 4;
    Dong, Roth, Su, "Gaussian differential privacy", JRSS B 84, 2022.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.func import vmap

from .. import random
from ..arguments import check_key, check_takes, shown
from .clipping import Clipping
from .gaussian import gaussian_epsilon
from .rdp import log_binomial
from .release import clipped_sums, noisy_mean

Release: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`release(gradients (n, D), key (2,)) -> (D,)`: what a step releases of n examples with these gradients."""

MU = 1.5
"""μ of the attack against correct code: large enough to be measured, with room for more."""
DIMENSIONS = 16


class Audit(NamedTuple):
    """The result of an audit of a step.

    Fields:
        claimed: float, ε at δ of a canary that is in each of the `steps` releases, if noise and clipping are as
            claimed: not ε of a training run.
        lower_bound: float, the empirical lower bound on that ε, with the stated confidence.
        steps: int, T, the releases of an attack.
        trials: int, attacks on each of the two sets.
        passed: bool, whether `lower_bound` is at most `claimed`.
    """

    claimed: float
    """ε at δ of a canary that is in each of the steps, if noise and clipping are as claimed."""
    lower_bound: float
    """The empirical lower bound on ε at δ, with the stated confidence."""
    steps: int
    """T, the steps of an attack."""
    trials: int
    """Attacks on each of the two sets."""

    @property
    def passed(self) -> bool:
        """Whether the lower bound is at most what is claimed."""
        return self.lower_bound <= self.claimed


def audit(
    release: Release,
    *,
    noise_multiplier: float,
    max_norm: float,
    delta: float = 1e-5,
    examples: int = 8,
    length: float = 10.0,
    trials: int = 1000,
    confidence: float = 0.999,
    key: Tensor,
) -> Audit:
    """Audits a step: attacks it with a canary, and bounds its ε from below.

    Args:
        release: the step, pure, which `vmap` maps over keys. It receives `examples` rows, and one more with the canary;
            it should divide by an expected number, the same for both.
        noise_multiplier: σ that the step claims, above 0.
        max_norm: the clipping norm C that the step claims, above 0.
        delta: δ in (0, 1), at which ε is reported.
        examples: rows besides the canary, at least 1. With few, a divisor that depends on the canary shows best.
        length: norm of the gradients, in clipping norms. Above 1 it shows missing clipping; rules that drop long
            gradients need one below 1.
        trials: attacks on each of the two sets, at least 40. Half of them choose the attacker's threshold.
        confidence: of the bound, in (0, 1).
        key: (2,), of the noise.

    Returns:
        The claimed ε and the lower bound.

    Raises:
        ValueError: a number is out of its range.
        TypeError: `release` is a private step or takes other arguments, or the key is no key.

    Guarantees: correct code passes with probability at least `confidence`.

    Cost: seconds: `2 trials T` steps on vectors of 16 numbers.

    Example:
        >>> from functorch_mnist import privacy
        >>> step = pipeline(privacy.Flat(2.0), noise_multiplier=1.0, expected=8.0)
        >>> audit(step, noise_multiplier=1.0, max_norm=2.0, key=random.key(0)).passed
        True

    Reference: Nasr et al., "Tight auditing of differentially private machine learning", USENIX Security 2023, section
        4.
    """
    check_key("audit", key)
    if hasattr(release, "mechanism"):
        raise TypeError(
            f"audit: release must be a function (gradients, key). Found {shown(release)}. "
            "Pass privacy.pipeline(clipping, …); for a training run use train.plant_canaries."
        )
    check_takes("audit", "release", release, ["gradients", "key"], "Pass privacy.pipeline(clipping, …)?")
    if not (0 < noise_multiplier < math.inf and 0 < max_norm < math.inf and 0 < confidence < 1 and 0 < delta < 1):
        raise ValueError(
            f"audit: noise_multiplier and max_norm above 0, delta and confidence in (0, 1). "
            f"Found {noise_multiplier}, {max_norm}, {delta}, {confidence}."
        )
    if examples < 1 or trials < 40:
        raise ValueError(f"audit: at least 1 example and 40 trials. Found {examples} and {trials}.")
    steps = max(1, round((MU * noise_multiplier) ** 2))
    canary = torch.zeros(DIMENSIONS, device=key.device)
    canary[0] = length * max_norm
    others = -canary.expand(examples, DIMENSIONS)
    worlds = []
    for number, rows in enumerate((others, torch.cat([others, canary[None]]))):
        keys = random.split(random.fold_in(key, number), trials * steps)
        seen = vmap(lambda k, rows=rows: release(rows, k))(keys)
        worlds.append(seen[:, 0].double().view(trials, steps).sum(1))
    mu = _least_mu(worlds[0], worlds[1], confidence)
    claimed = gaussian_epsilon(math.sqrt(steps) / noise_multiplier, delta)
    return Audit(claimed, gaussian_epsilon(mu, delta), steps, trials)


def pipeline(clipping: Clipping, *, noise_multiplier: float, expected: float) -> Release:
    """This library's own step, `clipped_sums` then `noisy_mean`, as the release of an audit.

    Args:
        clipping: the rule.
        noise_multiplier: σ, at least 0.
        expected: the divisor, above 0.

    Returns:
        A `Release`.
    """

    def release(gradients: Tensor, key: Tensor) -> Tensor:
        params = gradients.new_zeros(gradients.shape[1])
        state = clipping.init()
        sums = clipped_sums(lambda w, g: w @ g, params, gradients, clipping=clipping, clipping_state=state)
        grads, _ = noisy_mean(
            params, sums, key, clipping=clipping, clipping_state=state, noise_multiplier=noise_multiplier,
            expected=expected,
        )  # fmt: skip
        mean: Tensor = grads
        return mean

    return release


def _least_mu(without: Tensor, including: Tensor, confidence: float) -> float:
    """A lower bound on μ from scores, larger where the canary is: the first half of them chooses the threshold."""
    half = len(without) // 2
    first, second = (torch.stack([without[rows], including[rows]]) for rows in (slice(half), slice(half, 2 * half)))
    thresholds = first.flatten().quantile(torch.linspace(0.2, 0.8, 25, dtype=first.dtype, device=first.device))

    def apparent(threshold: float) -> float:
        return sum(_phi((half * rate + 0.5) / (half + 1)) for rate in _right(first, threshold))

    threshold = max(thresholds.tolist(), key=apparent)
    each = (1 - confidence) / 2
    rates = [1 - highest_rate(round((1 - rate) * half), half, each) for rate in _right(second, threshold)]
    return max(0.0, sum(map(_phi, rates))) if min(rates) > 0 else 0.0


def _right(scores: Tensor, threshold: float) -> tuple[float, float]:
    """The attacker's true negative and true positive rates."""
    return float((scores[0] <= threshold).double().mean()), float((scores[1] > threshold).double().mean())


def _phi(rate: float) -> float:
    """Φ⁻¹."""
    return NormalDist().inv_cdf(rate)


def highest_rate(errors: int, trials: int, chance: float) -> float:
    """The upper end of the Clopper-Pearson interval of an error rate, at a one-sided level `chance`."""
    if errors == trials:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        low, high = (rate, high) if _at_most(errors, trials, rate) > chance else (low, rate)
    return high


def _at_most(errors: int, trials: int, rate: float) -> float:
    """The probability of at most `errors` errors."""
    k = torch.arange(errors + 1, dtype=torch.float64)
    return float((log_binomial(trials, k) + k * math.log(rate) + (trials - k) * math.log1p(-rate)).logsumexp(0).exp())
