"""What a loss meets classes of unequal sizes with. With n_k examples of class k and N of all:

    balanced           w_k ∝ 1 / n_k
    effective number   w_k ∝ (1 - β) / (1 - β^n_k)
    logit adjustment   output_k + strength · log prior_k

Weights of either kind are scaled alike: Σ_k n_k w_k = N, so that their mean over the examples is 1 and a learning rate
keeps its meaning. They go into the `class_weights` of a loss.
"""

import torch
from torch import Tensor

from .. import tree
from ..hyperparameters import DECAY, FINITE, check, like


def balanced_weights(counts: Tensor) -> Tensor:
    """The weight of each class that gives every class the same part in the loss: N / (K n_k), K of classes that occur.

    Args:
        counts: (K,) integers, at least 0: the examples of each class.

    Returns:
        (K,) float32; 0 for a class without examples.

    Raises:
        ValueError: the counts are not (K,).
        TypeError: the counts are not integers.

    Guarantees: the mean weight over the examples is 1, and every class that occurs has the same sum of weights.

    Example:
        >>> balanced_weights(torch.tensor([3, 1, 0]))
        tensor([0.6667, 2.0000, 0.0000])
    """
    n = _checked("balanced_weights", counts)
    return _scaled(1 / n.clamp(min=1), n)


def effective_number_weights(counts: Tensor, *, beta: float | Tensor) -> Tensor:
    """The weight of each class by its effective number of examples, (1 - β^n_k) / (1 - β).

    An example is taken to cover a volume that others of its class may cover too, so that each further one adds less.

    Args:
        counts: (K,) integers, at least 0: the examples of each class.
        beta: in [0, 1). At 0 classes weigh alike; towards 1 the weights become the balanced ones. Of use are 1 - 1/m,
            with m the examples of a class from which on more of them add little.

    Returns:
        (K,) float32; 0 for a class without examples.

    Raises:
        ValueError: the counts are not (K,), or `beta` is a number outside [0, 1) or a tensor that is not 0-d.
        TypeError: the counts are not integers.

    Guarantees: the mean weight over the examples is 1, as with `balanced_weights`. Differentiable by a tensor `beta`
        above 0.

    Example:
        >>> effective_number_weights(torch.tensor([3, 1, 0]), beta=0.5)
        tensor([0.8421, 1.4737, 0.0000])

    Reference: Cui, Jia, Lin, Song, Belongie, "Class-balanced loss based on effective number of samples", CVPR 2019,
        equation 4, https://arxiv.org/abs/1901.05555. There the weights add up to K instead.
    """
    n = _checked("effective_number_weights", counts)
    check("effective_number_weights", DECAY, beta=beta)
    decay = torch.log(torch.as_tensor(beta, dtype=n.dtype, device=n.device))
    return _scaled(-1 / torch.expm1(n.clamp(min=1) * decay), n)


def logit_adjusted(outputs: Tensor, log_priors: Tensor, *, strength: float | Tensor = 1.0) -> Tensor:
    """Outputs to train on where classes are unequally common: outputs + strength · log prior.

    A model trained so has to raise a rare class above what its rarity says. It is used without the adjustment, and then
    its largest output is the class to give where all classes should be right equally often.

    Args:
        outputs: (..., K) logits or log-probabilities.
        log_priors: (K,) finite, the logarithm of each class's part of the training examples.
        strength: 0 changes nothing; 1 is what theory asks for.

    Returns:
        (..., K), float32 or wider.

    Raises:
        ValueError: the shapes do not agree, or `strength` is a number that is not finite or a tensor that is not 0-d.

    Example:
        >>> logit_adjusted(torch.zeros(2), torch.tensor([0.8, 0.2]).log()).exp()
        tensor([0.8000, 0.2000])

    Reference: Menon, Jayasumana, Rawat, Jain, Veit, Kumar, "Long-tail learning via logit adjustment", ICLR 2021,
        equation 10, https://arxiv.org/abs/2007.07314.
    """
    if outputs.dim() == 0 or log_priors.shape != outputs.shape[-1:]:
        raise ValueError(
            f"logit_adjusted: outputs must be (..., K) and log_priors (K,). "
            f"Found {tuple(outputs.shape)} and {tuple(log_priors.shape)}."
        )
    check("logit_adjusted", FINITE, strength=strength)
    wide = tree.wide(outputs)
    return wide + like(strength, wide) * log_priors.to(wide.dtype)


def _checked(where: str, counts: Tensor) -> Tensor:
    """The counts in float64."""
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"{where}: counts must be integers. Found {counts.dtype}. Count with torch.bincount?")
    if counts.dim() != 1:
        raise ValueError(f"{where}: counts must be (K,). Found {tuple(counts.shape)}.")
    return counts.double()


def _scaled(weights: Tensor, n: Tensor) -> Tensor:
    """Weights, 1 or more, with a mean over the examples of 1, and none for a class without examples."""
    kept = torch.where(n > 0, weights, 0)
    total = (kept * n).sum()
    return (kept * (n.sum() / torch.where(total > 0, total, 1))).float()
