"""Deep ensembles. With p_m = softmax(output_m) of model m of M, p̄ their mean and H the entropy,

    mean                   log p̄
    vote                   models that predict the class / M
    disagreement           pairs of models that predict different classes / pairs
    mutual information     H(p̄) - mean_m H(p_m)

The predictive entropy H(p̄) has two parts: the mutual information, which more training data would reduce (epistemic
uncertainty), and mean_m H(p_m), which they would not (aleatoric uncertainty).

Reference: Lakshminarayanan, Pritzel, Blundell, "Simple and scalable predictive uncertainty estimation using deep
ensembles", NeurIPS 2017, https://arxiv.org/abs/1612.01474. The two parts: Depeweg, Hernández-Lobato, Doshi-Velez,
Udluft, "Decomposition of uncertainty in Bayesian deep learning for efficient and risk-sensitive learning", ICML
2018, https://arxiv.org/abs/1710.07283.
"""

import math

import torch
from torch import Tensor

from . import tree
from .arguments import shown
from .losses import one_hot

__all__ = ["disagreement", "mean", "mutual_information", "vote"]


def __dir__() -> list[str]:
    return __all__


def mean(outputs: Tensor) -> Tensor:
    """The prediction of a deep ensemble: the logarithm of the mean of the models' probabilities.

    Args:
        outputs: (M, ..., K) logits or log-probabilities of M models, at least one.

    Returns:
        (..., K) log-probabilities, float32 or wider: outputs again, for a loss or an evaluation.

    Raises:
        ValueError: there is no model or no axis of classes.
        TypeError: the outputs are no tensor, such as a list of them.

    Guarantees: the mean cross-entropy is at most the models' average; of one model, its log-softmax.

    Example:
        >>> mean(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()).exp()
        tensor([0.7000, 0.3000])

    Reference: Lakshminarayanan, Pritzel, Blundell, "Simple and scalable predictive uncertainty estimation using deep
        ensembles", NeurIPS 2017, https://arxiv.org/abs/1612.01474.
    """
    return _mean(_log_probs("ensemble.mean", outputs))


def vote(outputs: Tensor) -> Tensor:
    """Majority voting: the fraction of models that predict each class, that of their largest output.

    Args:
        outputs: (M, ..., K) logits or log-probabilities of M models, at least one.

    Returns:
        (..., K) in [0, 1], float32 or wider. Ties are broken by the mean probability: of several classes with the most
        votes the most probable one keeps its fraction, and the others get the next smaller float. So the argmax is the
        class voted for.

    Raises:
        ValueError, TypeError: as in `mean`.

    Example:
        >>> vote(torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 9.0]]))
        tensor([0.6667, 0.0000, 0.3333])
    """
    log_probs = _log_probs("ensemble.vote", outputs)
    votes = _votes(outputs)
    first = votes == votes.amax(-1, keepdim=True)
    winner = one_hot(_mean(log_probs).masked_fill(~first, -torch.inf).argmax(-1), votes.shape[-1]).bool()
    fractions = votes.to(log_probs.dtype) / len(outputs)
    return torch.where(first & ~winner, torch.nextafter(fractions, torch.zeros_like(fractions)), fractions)


def disagreement(outputs: Tensor) -> Tensor:
    """The fraction of pairs of models that predict different classes.

    Args:
        outputs: (M, ..., K) logits or log-probabilities of M models, at least one.

    Returns:
        (...) float32 in [0, 1]; 0 of one model.

    Raises:
        ValueError, TypeError: as in `mean`.

    Example:
        >>> disagreement(torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 9.0]]))
        tensor(0.6667)
    """
    _check("ensemble.disagreement", outputs)
    models = len(outputs)
    return (models**2 - _votes(outputs).square().sum(-1)) / max(models * (models - 1), 1)


def mutual_information(outputs: Tensor) -> Tensor:
    """The epistemic uncertainty of an ensemble, in nats: the entropy of the mean minus the mean entropy.

    Args:
        outputs: (M, ..., K) logits or log-probabilities of M models, at least one.

    Returns:
        (...) from 0 to log M, float32 or wider.

    Raises:
        ValueError, TypeError: as in `mean`.

    Guarantees: 0 where all models give the same probabilities. A probability of 0 adds nothing.

    Example:
        >>> mutual_information(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log())
        tensor(0.6931)

    Reference: Depeweg, Hernández-Lobato, Doshi-Velez, Udluft, "Decomposition of uncertainty in Bayesian deep learning
        for efficient and risk-sensitive learning", ICML 2018, https://arxiv.org/abs/1710.07283; BALD: Houlsby, Huszár,
        Ghahramani, Lengyel, "Bayesian active learning for classification and preference learning", 2011.
    """
    # The mean divergence of a model from the mean: the same number, without the difference of two sums.
    log_probs = _log_probs("ensemble.mutual_information", outputs)
    probs = log_probs.exp()
    ratio = torch.where(probs > 0, log_probs - _mean(log_probs), 0)
    return (probs * ratio).sum(-1).mean(0).clamp(min=0)


def _mean(log_probs: Tensor) -> Tensor:
    return torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))


def _votes(outputs: Tensor) -> Tensor:
    """How many models predict each class: (M, ..., K) to (..., K), float32."""
    return one_hot(outputs.argmax(-1), outputs.shape[-1]).sum(0)


def _log_probs(where: str, outputs: Tensor) -> Tensor:
    _check(where, outputs)
    return tree.wide(outputs).log_softmax(-1)


def _check(where: str, outputs: Tensor) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"{where}: outputs must be one tensor (M, ..., K). Found {shown(outputs)}. Pass torch.stack(outputs)?"
        )
    if outputs.dim() < 2 or len(outputs) == 0:
        raise ValueError(
            f"{where}: outputs must be (M, ..., K) of at least one model. Found {tuple(outputs.shape)}. "
            "Stack the models' outputs?"
        )
