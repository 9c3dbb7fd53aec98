"""Losses of one example or of each example of a batch, and accuracy.

    cross_entropy      -Σ_k t_k log p_k,  t = (1 - s) onehot(label) + s / K,  p = softmax(output)
    mse                mean over the last axis of (output - target)²

A loss returns one number per example: it never averages over examples, so a batch is the stack of its examples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tree


def cross_entropy(
    outputs: Tensor, labels: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0
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
        ValueError: shapes do not agree, or `label_smoothing` is outside [0, 1].
        TypeError: the labels are not integers.

    Guarantees: equals `torch.nn.functional.cross_entropy(..., reduction="none")`.

    Example:
        >>> cross_entropy(torch.zeros(3, 10), torch.tensor([1, 2, 3]))
        tensor([2.3026, 2.3026, 2.3026])
    """
    check_labels("cross_entropy", outputs, labels)
    if class_weights is not None and class_weights.shape != outputs.shape[-1:]:
        raise ValueError(
            f"cross_entropy: class_weights must be (K,), {tuple(outputs.shape[-1:])}. "
            f"Found {tuple(class_weights.shape)}."
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing must be in [0, 1]. Found {label_smoothing}.")
    log_probs = F.log_softmax(tree.wide(outputs), dim=-1)
    terms = log_probs if class_weights is None else log_probs * class_weights
    hit = terms.gather(-1, labels[..., None].long()).squeeze(-1)
    if label_smoothing == 0:
        return -hit
    return -(1 - label_smoothing) * hit - label_smoothing * terms.mean(-1)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error over the last axis, per example.

    Args:
        outputs: (..., K).
        targets: (..., K).

    Returns:
        (...), float32 or wider.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> mse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        tensor(2.)
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"mse: outputs and targets must have one shape. Found {tuple(outputs.shape)} and {tuple(targets.shape)}."
        )
    return (tree.wide(outputs) - targets).square().mean(-1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Float32 vectors with a one at the label: (...) integers to (..., classes). Works under `vmap`; torch's does not.

    Example:
        >>> one_hot(torch.tensor(1), 3)
        tensor([0., 1., 0.])
    """
    return (labels[..., None] == torch.arange(classes, device=labels.device)).float()


def accuracy(outputs: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many examples have their largest output at the label, and how many there are.

    Args:
        outputs: (..., K).
        labels: (...) integers in [0, K).
        mask: (...) bool, `False` for an example that does not count.

    Returns:
        `(correct, total)`, 0-d int64 counts. Add them over batches, divide once.

    Raises:
        ValueError: shapes do not agree, or the mask is not bool.
        TypeError: the labels are not integers.

    Example:
        >>> accuracy(torch.eye(3), torch.tensor([0, 1, 1]))
        (tensor(2), tensor(3))
    """
    check_labels("accuracy", outputs, labels)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != labels.shape):
        raise ValueError(
            f"accuracy: the mask must be bool {tuple(labels.shape)}, as the labels. "
            f"Found {mask.dtype} {tuple(mask.shape)}."
        )
    hits = outputs.argmax(-1) == labels
    counted = torch.ones_like(hits) if mask is None else mask
    return (hits & counted).sum(), counted.sum()


def check_labels(where: str, outputs: Tensor, labels: Tensor) -> None:
    """Refuses labels that are not integers (...) for outputs (..., K)."""
    if outputs.dim() == 0 or outputs.shape[:-1] != labels.shape:
        raise ValueError(
            f"{where}: outputs (..., K) and labels (...) must share their leading axes. "
            f"Found {tuple(outputs.shape)} and {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{where}: labels must be integers in [0, K). Found {labels.dtype}.")
