"""Calibration of a classifier: reliability diagram, ECE, Brier score, temperature scaling. With p the probabilities,

    confidence             max_k p_k
    ECE                    Σ_b n_b / N |accuracy_b - confidence_b|,  over bins b of equal width of the confidence
    temperature            argmin over T of the mean cross-entropy of softmax(output / T)
    Brier score            mean of Σ_k (p_k - onehot(label)_k)²

Reference: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", ICML 2017,
https://arxiv.org/abs/1706.04599. Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather
Review 78, 1950.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .losses import one_hot
from .losses.labels import check_labels

__all__ = ["Reliability", "brier", "reliability", "temperature"]


def __dir__() -> list[str]:
    return __all__


_MOST = 100.0
"""The highest temperature, and the inverse of the lowest."""


class Reliability(NamedTuple):
    """The reliability diagram: confidence and accuracy in each bin of the confidence, (bins,) each."""

    confidence: Tensor
    """float64: the mean confidence; NaN in an empty bin."""
    accuracy: Tensor
    """float64: the fraction of examples classified correctly; NaN in an empty bin."""
    examples: Tensor
    """int64: the number of examples in the bin."""

    @property
    def expected_error(self) -> Tensor:
        """The expected calibration error (ECE), 0-d float64: the mean over examples of their bin's gap."""
        return (self._gaps * self.examples).sum() / self.examples.sum()

    @property
    def maximum_error(self) -> Tensor:
        """The maximum calibration error (MCE), 0-d float64: the largest gap of a bin."""
        return self._gaps.amax()

    @property
    def _gaps(self) -> Tensor:
        """(bins,): 0 for an empty bin."""
        return torch.where(self.examples > 0, (self.accuracy - self.confidence).abs(), 0)


def reliability(probs: Tensor, labels: Tensor, *, bins: int = 15) -> Reliability:
    """The reliability diagram, from which ECE follows: accuracy against confidence, in bins of equal width.

    Args:
        probs: (N, K) probabilities, N at least 1: `outputs.softmax(-1)`.
        labels: (N,) integers in [0, K).
        bins: how many, at least 1; bin b holds the confidences in (b / bins, (b + 1) / bins].

    Returns:
        Mean confidence, accuracy and number of examples of each bin. `expected_error` is ECE, `maximum_error` MCE.

    Raises:
        ValueError: shapes do not agree, there is no example, or `bins` is below 1.
        TypeError: the labels are not integers.

    Guarantees: each example is in one bin. With one bin, `expected_error` is the gap between accuracy and mean
        confidence.

    Cost: N · bins float64.

    Example:
        >>> diagram = reliability(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 0]), bins=2)
        >>> diagram.examples, diagram.expected_error
        (tensor([0, 2]), tensor(0.2500, dtype=torch.float64))

    Reference: Naeini, Cooper, Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015
        (ECE, MCE); Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", ICML 2017, section 2.
    """
    _check("reliability", probs, labels)
    if bins < 1:
        raise ValueError(f"reliability: bins must be at least 1. Found {bins}.")
    confidence, predicted = probs.double().max(-1)
    inner = torch.arange(1, bins, dtype=torch.float64, device=probs.device) / bins
    member = one_hot((confidence[:, None] > inner).sum(-1), bins).double()  # (N, bins)
    count = member.sum(0)

    def mean(values: Tensor) -> Tensor:
        return torch.where(count > 0, values @ member / count.clamp(min=1), math.nan)

    return Reliability(mean(confidence), mean((predicted == labels).double()), count.long())


def temperature(outputs: Tensor, labels: Tensor, *, steps: int = 50) -> Tensor:
    """Temperature scaling: the T at which softmax(output / T) has the least mean cross-entropy.

    The cross-entropy is convex in 1 / T, so its derivative has one root, by bisection of log T. Take held-out examples.
    The predicted class is the same at any T.

    Args:
        outputs: (N, K) logits or log-probabilities, N at least 1.
        labels: (N,) integers in [0, K).
        steps: bisections, at least 1; 50 reach the precision of float64.

    Returns:
        0-d float64 in [0.01, 100], within a factor `100^(2 / 2^steps)` of the minimiser; no gradient flows to it. At
        an end of the range the minimum lies beyond: T tends to 0 for a model that is always right, to infinity for one
        whose outputs carry no information. It is 1 where every T is equally good.

    Raises:
        ValueError: shapes do not agree, there is no example, or `steps` is below 1.
        TypeError: the labels are not integers.

    Guarantees: outputs multiplied by a factor have their temperature multiplied by it, within the range. Works under
        `vmap`, for example over models.

    Cost: each step is one softmax in float64.

    Example:
        >>> temperature(torch.tensor([[2.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))  # 2 / log 3
        tensor(1.8205, dtype=torch.float64)

    Reference: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", ICML 2017, section 4.2.
    """
    _check("temperature", outputs, labels)
    if steps < 1:
        raise ValueError(f"temperature: steps must be at least 1. Found {steps}.")
    with torch.no_grad():
        # Relative to the largest, and finite where a probability is 0.
        z = (outputs.double() - outputs.double().amax(-1, keepdim=True)).clamp(min=-torch.finfo(torch.float32).max)
        own = one_hot(labels, outputs.shape[-1]).double()
        low = z.new_full((), -math.log(_MOST))
        high = -low
        for _ in range(steps):
            middle = (low + high) / 2
            # d mean cross-entropy / d (1 / T): positive where T is too low.
            slope = (((z * torch.exp(-middle)).softmax(-1) - own) * z).sum(-1).mean()
            low, high = torch.where(slope >= 0, middle, low), torch.where(slope <= 0, middle, high)
        return torch.exp((low + high) / 2)


def brier(probs: Tensor, labels: Tensor) -> Tensor:
    """The Brier score: the mean over examples of the squared distance from probabilities to the label.

    Args:
        probs: (N, K) probabilities, N at least 1: `outputs.softmax(-1)`.
        labels: (N,) integers in [0, K).

    Returns:
        0-d float64: 0 for confident correct predictions, 2 for confident wrong ones.

    Raises:
        ValueError: shapes do not agree, or there is no example.
        TypeError: the labels are not integers.

    Example:
        >>> brier(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0]))
        tensor(0.2500, dtype=torch.float64)

    Reference: Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78, 1950.
    """
    _check("brier", probs, labels)
    return (probs.double() - one_hot(labels, probs.shape[-1])).square().sum(-1).mean()


def _check(where: str, outputs: Tensor, labels: Tensor) -> None:
    check_labels(where, outputs, labels)
    if labels.dim() != 1 or len(labels) == 0:
        raise ValueError(f"{where}: labels must be (N,), at least one. Found {tuple(labels.shape)}.")
