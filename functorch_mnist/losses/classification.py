"""Losses of classes, and accuracy. With y the label,

    cross_entropy      -Σ_k w_k t_k log p_k,  t = (1 - s) onehot(y) + s / K
    focal              -w_y (1 - p_y)^γ log p_y

where p = softmax(output) and w are the weights of classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import tree
from ..hyperparameters import AT_LEAST_ZERO, PART, check, like
from .labels import check_labels, in_range, own


def cross_entropy(
    outputs: Tensor, labels: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float | Tensor = 0.0
) -> Tensor:
    """The cross-entropy of softmax probabilities, per example.

    Args:
        outputs: (..., K) logits or log-probabilities (the softmax of log-probabilities is what they stand for).
        labels: (...) integers in [0, K).
        class_weights: (K,) factors of each class's term, or none for ones.
        label_smoothing: the part `s` in [0, 1] of the target that is spread evenly over the classes.

    Returns:
        (...) losses in nats, float32 or wider.

    Raises:
        ValueError: shapes do not agree, a label is out of range, or `label_smoothing` is a number outside [0, 1] or a
            tensor that is not 0-d.
        TypeError: the labels are not integers.
        RuntimeError: compiled or on a GPU, a label is out of range.

    Guarantees: equals `torch.nn.functional.cross_entropy(..., reduction="none")`.

    Example:
        >>> cross_entropy(torch.zeros(3, 10), torch.tensor([1, 2, 3]))
        tensor([2.3026, 2.3026, 2.3026])
    """
    log_probs, terms, hit = _terms("cross_entropy", outputs, labels, class_weights)
    check("cross_entropy", PART, label_smoothing=label_smoothing)
    if not isinstance(label_smoothing, Tensor) and label_smoothing == 0:
        return -hit
    spread = like(label_smoothing, log_probs)
    return -(1 - spread) * hit - spread * terms.mean(-1)


def focal(
    outputs: Tensor, labels: Tensor, *, gamma: float | Tensor = 2.0, class_weights: Tensor | None = None
) -> Tensor:
    """The focal loss, per example: cross-entropy that weighs an example less the more probable its label is.

    Args:
        outputs: (..., K) logits or log-probabilities.
        labels: (...) integers in [0, K).
        gamma: the power γ of the factor `(1 - p_y)^γ`, at least 0.
        class_weights: (K,) factors of each class's loss, or none for ones.

    Returns:
        (...) losses in nats, float32 or wider.

    Raises:
        ValueError: shapes do not agree, a label is out of range, or `gamma` is a number below 0 or infinite, or a
            tensor that is not 0-d.
        TypeError: the labels are not integers.
        RuntimeError: compiled or on a GPU, a label is out of range.

    Guarantees: at γ = 0 equals `cross_entropy`. However close p_y is to 1, the loss and its derivatives by the outputs
        and by a tensor `gamma` are finite, for finite outputs.

    Example:
        >>> focal(torch.zeros(3, 10), torch.tensor([1, 2, 3]))
        tensor([1.8651, 1.8651, 1.8651])

    Reference: Lin, Goyal, Girshick, He, Dollár, "Focal loss for dense object detection", ICCV 2017, equation 5,
        https://arxiv.org/abs/1708.02002.
    """
    log_probs, _, hit = _terms("focal", outputs, labels, class_weights)
    check("focal", AT_LEAST_ZERO, gamma=gamma)
    # 1 - p_y is added up from the other classes: no difference cancels, and no power of 0 is taken.
    least = torch.finfo(log_probs.dtype).min
    log_rest = torch.logsumexp(log_probs.masked_fill(own(labels, outputs.shape[-1]), least), dim=-1)
    return -torch.exp(like(gamma, log_rest) * log_rest) * hit


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Float32 vectors with a one at the label: (...) integers to (..., classes). Works under `vmap`; torch's does not.

    Args:
        labels: (...) integers in [0, classes).
        classes: K, at least 1.

    Returns:
        (..., K) float32.

    Raises:
        ValueError: a label is not in [0, classes).
        RuntimeError: compiled or on a GPU, a label is out of range.

    Example:
        >>> one_hot(torch.tensor(1), 3)
        tensor([0., 1., 0.])
    """
    return own(in_range("one_hot", labels, classes), classes).float()


def accuracy(outputs: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many examples have their largest output at the label, and how many there are.

    Args:
        outputs: (..., K).
        labels: (...) integers in [0, K).
        mask: (...) bool, `False` for an example that does not count, whatever its label.

    Returns:
        `(correct, total)`, 0-d int64 counts. Add them over batches, divide once.

    Raises:
        ValueError: shapes do not agree, a label is out of range, or the mask is not bool.
        TypeError: the labels are not integers.
        RuntimeError: compiled or on a GPU, a label is out of range.

    Example:
        >>> accuracy(torch.eye(3), torch.tensor([0, 1, 1]))
        (tensor(2), tensor(3))
    """
    if mask is not None and (mask.dtype != torch.bool or mask.shape != labels.shape):
        raise ValueError(
            f"accuracy: the mask must be bool {tuple(labels.shape)}, as the labels. "
            f"Found {mask.dtype} {tuple(mask.shape)}."
        )
    labels = check_labels("accuracy", outputs, labels, mask)
    hits = outputs.argmax(-1) == labels
    counted = torch.ones_like(hits) if mask is None else mask
    return (hits & counted).sum(), counted.sum()


def _terms(where: str, outputs: Tensor, labels: Tensor, class_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """log p_k and w_k log p_k (..., K), and the latter of the label (...)."""
    labels = check_labels(where, outputs, labels)
    if class_weights is not None and class_weights.shape != outputs.shape[-1:]:
        raise ValueError(
            f"{where}: class_weights must be (K,), {tuple(outputs.shape[-1:])}. Found {tuple(class_weights.shape)}."
        )
    log_probs = F.log_softmax(tree.wide(outputs), dim=-1)
    terms = log_probs if class_weights is None else log_probs * class_weights
    return log_probs, terms, terms.gather(-1, labels[..., None].long()).squeeze(-1)
