"""Classes of unequal sizes: made so by leaving examples out, and sampled as if they were not."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import random
from .sets import Split


def imbalanced(split: Split, parts: Mapping[int, float], *, key: Tensor) -> Split:
    """The examples of which only a random part is kept of some classes.

    Args:
        split: images (N, …) and labels (N,).
        parts: for each class to thin out, which part of its examples to keep, in [0, 1].
        key: names the draw.

    Returns:
        The examples kept, in their order. Of n examples of a class, `round(part n)` are kept, and at least 1 unless the
        part is 0.

    Raises:
        ValueError: a part is outside [0, 1], or a class has no examples.

    Guarantees:
        - a function of the key; which examples of a class are kept does not depend on the other classes;
        - what a part keeps, a greater part under the same key keeps too;
        - every example of a class that is not named is kept.

    Example:
        >>> four = Split(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
        >>> imbalanced(four, {1: 0.5}, key=random.key(0)).labels
        tensor([0, 1, 0])
    """
    kept = torch.ones_like(split.labels, dtype=torch.bool)
    for label, part in parts.items():
        if not 0 <= part <= 1:
            raise ValueError(f"imbalanced: the part of a class must be in [0, 1]. Found {part} for class {label}.")
        places = (split.labels == label).nonzero().squeeze(1)
        if len(places) == 0:
            raise ValueError(f"imbalanced: a class in parts must have examples. Found none of class {label}.")
        count = max(round(part * len(places)), 1 if part > 0 else 0)
        order = random.permutation(random.fold_in(key, label), len(places))
        kept[places[order[count:]]] = False
    return Split(split.images[kept], split.labels[kept])


def balanced_order(labels: Tensor, *, key: Tensor, epoch: int) -> Tensor:
    """The examples that an epoch of balanced sampling sees: every class equally often, its examples in turn.

    The counterpart for unequal classes of `epoch_order`: as many examples, so an epoch has as many steps. A small class
    goes round many times, and of a large one a part is seen.

    Args:
        labels: (N,) integers, at least one.
        key: names the draws; it is on the device of the labels.
        epoch: has an order of its own.

    Returns:
        (N,) int64 positions in the data set, in random order.

    Raises:
        ValueError: the labels are not (N,), or there is none.
        TypeError: the labels are not integers.

    Guarantees:
        - a function of the labels, the key and the epoch alone;
        - any two classes that have examples are seen equally often, or one once more than the other;
        - no example is seen twice before all of its class were seen once, and so on: in an epoch, any two of a class
          are seen equally often, or one once more than the other.

    Cost: some sorts of 2 N numbers at most.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 0, 1])
        >>> labels[balanced_order(labels, key=random.key(0), epoch=0)].sort().values
        tensor([0, 0, 0, 1, 1, 1])
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"balanced_order: labels must be integers. Found {labels.dtype}.")
    if labels.dim() != 1 or len(labels) == 0:
        raise ValueError(f"balanced_order: labels must be (N,), at least one. Found {tuple(labels.shape)}.")
    share_key, round_key, order_key = random.split(random.fold_in(key, epoch), 3).unbind(-2)
    _, owners, sizes = labels.unique(return_inverse=True, return_counts=True)  # of the C classes that occur
    members = owners.argsort(stable=True)  # the examples, class by class
    each, over = divmod(len(labels), len(sizes))
    wanted = each + (random.permutation(share_key, len(sizes)) < over)  # (C,) draws of each class
    # Slots in whole rounds of each class, which its draws fill up to somewhere in the last.
    slots = -(-wanted // sizes) * sizes
    owner = torch.arange(len(sizes), device=labels.device).repeat_interleave(slots)
    place = torch.arange(len(owner), device=labels.device)
    draw = place - (slots.cumsum(0) - slots)[owner]
    round_start = place - draw % sizes[owner]
    # Sorted by round, then at random, the slots of a round are a permutation of the class.
    words = random.bits(round_key, (len(owner),)).long() & 0xFFFFFFFF
    turn = (round_start << 32 | words).argsort(stable=True) - round_start
    seen = members[(sizes.cumsum(0) - sizes)[owner] + turn][draw < wanted[owner]]
    shuffled: Tensor = seen[random.permutation(order_key, len(labels))]
    return shuffled
