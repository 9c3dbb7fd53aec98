"""How good a ranking is: synthetic label noise, and AUC, recall and rank correlation to measure its detection."""

import torch
from torch import Tensor

from .. import random


def label_noise(labels: Tensor, classes: int, *, key: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Symmetric label noise: a fraction of the labels flipped, each to another class, all of which are equally likely.

    Args:
        labels: (N,) integers in [0, classes).
        classes: K, at least 2.
        key: (2,), of the draw.
        fraction: from 0 to 1: `round(fraction N)` labels are flipped, drawn without replacement.

    Returns:
        The noisy labels (N,), and which are flipped, (N,) bool.

    Raises:
        ValueError: `fraction` or `classes` is out of its range, or a label is.
        TypeError: the labels are not integers (N,).

    Example:
        >>> labels, flipped = label_noise(torch.zeros(10, dtype=torch.int64), 2, key=random.key(0), fraction=0.3)
        >>> int(labels.sum()), bool((flipped == (labels == 1)).all())
        (3, True)
    """
    if not 0 <= fraction <= 1 or classes < 2:
        raise ValueError(
            f"label_noise: fraction must be from 0 to 1, classes at least 2. Found {fraction} and {classes}."
        )
    if labels.dim() != 1 or labels.dtype not in (torch.uint8, torch.int32, torch.int64):
        raise TypeError(f"label_noise: labels must be integers (N,). Found {labels.dtype} {tuple(labels.shape)}.")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"label_noise: labels must be in [0, {classes}). Found {int(labels.min())} to {int(labels.max())}."
        )
    which_key, shift_key = random.split(key)
    chosen = random.permutation(which_key, len(labels))[: round(fraction * len(labels))]
    flipped = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    flipped[chosen] = True
    shift = random.randint(shift_key, (len(labels),), 1, classes)
    return torch.where(flipped, (labels + shift) % classes, labels), flipped


def auc(scores: Tensor, positive: Tensor) -> float:
    """The area under the ROC curve: the probability that a positive example scores higher than a negative, ties half.

    Args:
        scores: (N,), higher for examples that are taken for positive, without NaN.
        positive: (N,) bool, such as which labels are flipped.

    Returns:
        From 0 to 1; 0.5 for scores that carry no information.

    Raises:
        ValueError: shapes differ, a score is NaN, or all examples are of one kind.

    Example:
        >>> auc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False]))
        1.0
    """
    _check("auc", scores, positive)
    positives = int(positive.sum())
    others = len(positive) - positives
    if not positives or not others:
        raise ValueError(f"auc: examples of both kinds are needed. Found {positives} and {others}.")
    wins = float(ranks(scores)[positive].sum()) - positives * (positives + 1) / 2
    return wins / (positives * others)


def recall_at(scores: Tensor, positive: Tensor, checked: float) -> float:
    """The recall of the highest scores: the fraction of the positive examples among them, averaged over orders of ties.

    Args:
        scores: (N,), without NaN.
        positive: (N,) bool, at least one True.
        checked: from 0 to 1: the fraction of all examples that is checked, those with the highest scores.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: shapes differ, a score is NaN, no example is positive, or `checked` is out of its range.

    Example:
        >>> recall_at(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, True, False, False]), 0.5)
        0.5
    """
    _check("recall_at", scores, positive)
    if not 0 <= checked <= 1 or not positive.any():
        raise ValueError(f"recall_at: checked must be from 0 to 1, and something positive. Found {checked}.")
    count = round(checked * len(scores))
    if not count:
        return 0.0
    last = scores.sort(descending=True).values[count - 1]
    above, tied = scores > last, scores == last
    of_ties = (count - int(above.sum())) * float(positive[tied].double().mean())
    return (int(positive[above].sum()) + of_ties) / int(positive.sum())


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation along the first axis; ties have their mean rank.

    Args:
        a, b: (N, …), N at least 2, without NaN.

    Returns:
        (…) float64 from -1 to 1; 0 where all numbers of `a` or of `b` are equal.

    Raises:
        ValueError: shapes differ, N is below 2, or a number is NaN.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 5.0, 0.0])).round(decimals=9)
        tensor(-1., dtype=torch.float64)
    """
    if a.shape != b.shape or a.dim() < 1 or len(a) < 2:
        raise ValueError(
            f"rank_correlation: two tensors (N, …) of one shape, N at least 2. "
            f"Found {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if a.isnan().any() or b.isnan().any():
        raise ValueError("rank_correlation: numbers have ranks. Found NaN.")
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(0), y - y.mean(0)
    size = torch.linalg.vector_norm(x, dim=0) * torch.linalg.vector_norm(y, dim=0)
    return torch.where(size > 0, (x * y).sum(0) / size, 0.0)


def ranks(values: Tensor) -> Tensor:
    """The ranks of numbers along the first axis: the least has 1, ties have their mean rank.

    Args:
        values: (N, …), without NaN.

    Returns:
        (N, …), float64.

    Example:
        >>> ranks(torch.tensor([5.0, 1.0, 5.0]))
        tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    rows = values.movedim(0, -1).contiguous()
    ordered = rows.sort(-1).values
    below, up_to = (torch.searchsorted(ordered, rows, right=right) for right in (False, True))
    return ((below + up_to + 1).double() / 2).movedim(-1, 0)


def _check(where: str, scores: Tensor, positive: Tensor) -> None:
    if scores.dim() != 1 or positive.shape != scores.shape or positive.dtype != torch.bool or scores.isnan().any():
        raise ValueError(
            f"{where}: scores (N,) without NaN, and positive (N,) bool. "
            f"Found {tuple(scores.shape)}, {positive.dtype} {tuple(positive.shape)}."
        )
