"""One-run auditing: a lower bound on ε from m canaries, each included by a fair coin, and guesses of the coins.

Each canary has a score, larger where the run was trained on it. The k₊ highest are guessed to be included, the k₋
lowest to be excluded, and v of these r = k₊ + k₋ guesses are correct. Two hypotheses are tested:

    (ε, δ)   P[V ≥ v] ≤ β + 2 m δ max_i (P[v - i ≤ W < v]) / i,    W ~ Binomial(r, 1 / (1 + e^-ε)),  β = P[W ≥ v]
    μ        with f̄(x) = Φ(Φ⁻¹(x) + μ), 1 less the trade-off function of a Gaussian of μ, for each c
             E[V; V ≥ c] / m ≤ f̄(E[r - V; V ≥ c - 1] / m)

The first holds for every mechanism. The second, for μ-GDP mechanisms, is tighter: it uses all δ at once. It follows
from flipping one coin, averaged over canaries. With t_c = P[V ≥ c] and s_c = t_c + t_{c+1} + …, it says

    t_c ≥ (m f̄⁻¹((c t_{c+1} + s_{c+1}) / m) + s_{c+1}) / (r - c)

which grows in all t above c. So from t_v = α downwards it bounds t_0; a bound above 1 is a contradiction, and then
P[V ≥ v] < α.

Both hold for a mechanism whose releases depend jointly on all coins. Where each canary has its own coordinate, with its
own sampling and noise, a score carries no information on other coins. Then guesses by a threshold are independent, each
correct with probability at most Φ(μ/2), and the Clopper-Pearson interval is tighter still. The threshold is the median
score of a tenth of the canaries, which are not guessed.

In contrast, `audit` repeats a single step thousands of times with a canary in each; this audits one whole training run,
sampling included.

Reference: Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023, theorem 5.2 and
    appendix D; Mahloujifar, Melis, Chaudhuri, "Auditing f-differential privacy in one run", arXiv
    2410.22235; Dong, Roth, Su, "Gaussian differential privacy", JRSS B 84, 2022.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from .gaussian import gaussian_epsilon
from .rdp import log_binomial
from .step_audit import highest_rate


class LowerBound(NamedTuple):
    """Lower bounds on the ε of one run, each with the stated confidence.

    Fields:
        epsilon: float, a lower bound on ε at δ of any mechanism.
        gaussian: float, a lower bound on ε at δ if the mechanism is Gaussian (μ-GDP), as a run of many noisy steps
            nearly is.
        mu: float, the lower bound on μ from which `gaussian` follows.
        independent: float, a lower bound on ε at δ if it is Gaussian and, besides, scores carry no information on other
            canaries' coins, as with `train.plant_canaries` in correct code: the highest, which detects faults best.
        guesses: int, r, the number of guesses.
        correct: int, v, the number of correct guesses.
    """

    epsilon: float
    """A lower bound on ε at δ of any mechanism."""
    gaussian: float
    """A lower bound on ε at δ if the mechanism is Gaussian (μ-GDP), as a run of many noisy steps nearly is."""
    mu: float
    """The lower bound on μ that it follows from."""
    independent: float
    """A lower bound on ε at δ if it is Gaussian and, besides, scores carry no information on other canaries' coins."""
    guesses: int
    """r, the number of guesses."""
    correct: int
    """v, the number of correct guesses."""


def lower_bound(
    scores: Tensor,
    included: Tensor,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    guesses_per_side: int | None = None,
) -> LowerBound:
    """One-run auditing: lower bounds on ε from the scores of canaries.

    Args:
        scores: (m,), larger where a canary seems to be included; computed without the coins.
        included: (m,) bool, the coins: fair, independent of each other and of all else.
        delta: δ in (0, 1), at which ε is reported.
        confidence: of each bound, in (0, 1).
        guesses_per_side: k₊ = k₋, how many of the highest and of the lowest scores are guessed. Set it before the
            scores are seen; by default m / 10, which gave the highest bounds at ε from 1 to 10.

    Returns:
        Lower bounds under three assumptions, and the guesses that they follow from.

    Raises:
        ValueError: shapes, types or numbers do not fit.

    Guarantees: each bound exceeds the true ε with probability at most 1 - `confidence`. Only scores' order counts.

    Cost: tens of milliseconds for 1,000 canaries.

    Example:
        >>> from functorch_mnist import random
        >>> included = random.bernoulli(random.key(0), 0.5, (1000,))  # of a Gaussian mechanism of μ = 1, ε = 4.38
        >>> bound = lower_bound(included + random.normal(random.key(1), (1000,)), included)
        >>> round(bound.epsilon, 2), round(bound.gaussian, 2), round(bound.independent, 2)
        (1.33, 2.13, 3.25)

    Reference: Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023, theorem 5.2;
        Mahloujifar, Melis, Chaudhuri, "Auditing f-differential privacy in one run", 2024.
    """
    if scores.dim() != 1 or included.shape != scores.shape or included.dtype != torch.bool:
        raise ValueError(
            f"lower_bound: scores must be (m,), included bool (m,). Found {tuple(scores.shape)} and "
            f"{included.dtype} {tuple(included.shape)}."
        )
    scores, included, canaries = scores.cpu(), included.cpu(), len(scores)
    each = max(1, canaries // 10) if guesses_per_side is None else guesses_per_side
    if not 1 <= each <= canaries // 2:
        raise ValueError(
            "lower_bound: guesses_per_side must be from 1 to half of the canaries. "
            f"Found {each} and {canaries} canaries."
        )
    if not (0 < delta < 1 and 0 < confidence < 1):
        raise ValueError(f"lower_bound: delta and confidence must be in (0, 1). Found {delta} and {confidence}.")
    order, guesses, chance = scores.argsort(stable=True), 2 * each, 1 - confidence
    correct = int((~included[order[:each]]).sum() + included[order[-each:]].sum())
    epsilon = _largest(lambda epsilon: binomial_p_value(canaries, guesses, correct, epsilon, delta) < chance)
    mu = _largest(lambda mu: gaussian_refuted(canaries, guesses, correct, mu, chance))
    apart = max(1, canaries // 10)
    wrong = int(((scores[apart:] > scores[:apart].median()) != included[apart:]).sum())
    right = 1 - highest_rate(wrong, canaries - apart, chance)
    independent = gaussian_epsilon(2 * NormalDist().inv_cdf(max(0.5, right)), delta)
    return LowerBound(epsilon, gaussian_epsilon(mu, delta), mu, independent, guesses, correct)


def binomial_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """A bound on the probability of at least `correct` correct guesses, if the mechanism is (ε, δ)-DP.

    Args:
        canaries: m.
        guesses: r, from `correct` to m.
        correct: v, at least 0.
        epsilon: ε, at least 0.
        delta: δ, from 0 to 1.

    Example:
        >>> round(binomial_p_value(10, 3, 3, 0.0, 0.0), 9)
        0.125
    """
    k = torch.arange(guesses + 1, dtype=torch.float64)
    chances = (log_binomial(guesses, k) - (guesses - k) * epsilon - guesses * math.log1p(math.exp(-epsilon))).exp()
    below = chances[:correct].flip(0).cumsum(0) / (k[:correct] + 1)
    steepest = float(below.max()) if correct else 0.0
    return min(1.0, float(chances[correct:].sum()) + 2 * canaries * delta * steepest)


def gaussian_refuted(canaries: int, guesses: int, correct: int, mu: float, chance: float) -> bool:
    """Whether at least `correct` correct guesses are less probable than a given level, if the mechanism is μ-GDP.

    Args:
        canaries: m.
        guesses: r, from `correct` to m.
        correct: v, at least 0.
        mu: μ, at least 0.
        chance: α in (0, 1).

    Example:
        >>> gaussian_refuted(10, 10, 10, 0.0, 0.05), gaussian_refuted(10, 10, 10, 2.0, 0.05)
        (True, False)
    """
    normal, tail, total = NormalDist(), chance, chance  # t_{c+1} and s_{c+1}
    for c in range(correct - 1, -1, -1):
        right = (c * tail + total) / canaries
        wrong = normal.cdf(normal.inv_cdf(right) - mu) if right < 1 else 1.0
        tail = max(tail, (canaries * wrong + total) / (guesses - c))
        if tail > 1:
            return True
        total += tail
    return False


def _largest(refuted: Callable[[float], bool]) -> float:
    """The largest refuted number, where all below it are refuted, or 0: rounded down to eight digits."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-8 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
