"""Batches of example numbers: an order per epoch, drawn from a key."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import random


class Batch(NamedTuple):
    """Which examples a step sees."""

    examples: Tensor
    """(B,) int64: positions in the data set."""
    mask: Tensor | None
    """(B,) bool, `False` for padding; none where nothing is padded."""


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Batches in an epoch; the last may be partial.

    Args:
        examples: N.
        batch_size: B, at least 1.

    Example:
        >>> steps_per_epoch(60_000, 64)
        938
    """
    return -(-examples // batch_size)


def epoch_order(examples: int, *, key: Tensor, epoch: int) -> Tensor:
    """The order in which an epoch sees the examples: (N,) int64, a function of the key and the epoch alone.

    Args:
        examples: N.
        key: (2,) int32.
        epoch: from 0.

    Raises:
        TypeError: `examples` is not an int.

    Example:
        >>> epoch_order(3, key=random.key(0), epoch=0).sort().values
        tensor([0, 1, 2])
    """
    if not isinstance(examples, int):
        raise TypeError(f"epoch_order: examples must be an int, N. Found {type(examples).__name__}. Use len(images).")
    return random.permutation(random.fold_in(key, epoch), examples)


def batches(order: Tensor, *, batch_size: int, start: int = 0, pad: bool) -> Iterator[Batch]:
    """The batches of an epoch, in order.

    Args:
        order: (N,) int64 example numbers, at least one.
        batch_size: B, at least 1.
        start: number of batches to leave out at the beginning.
        pad: fill the last batch up to B rows with a mask, rather than yield it short.

    Raises:
        ValueError: a number is out of its range, or there is no example.

    Example:
        >>> [len(batch.examples) for batch in batches(torch.arange(10), batch_size=4, pad=False)]
        [4, 4, 2]
    """
    if len(order) < 1 or batch_size < 1 or start < 0:
        raise ValueError(
            f"batches: examples and batch_size must be at least 1, start at least 0. "
            f"Found {len(order)}, {batch_size}, {start}."
        )
    for index in order.split(batch_size)[start:]:
        rows = len(index)
        if pad:
            mask = torch.arange(batch_size, device=index.device) < rows
            yield Batch(torch.cat([index, index[:1].expand(batch_size - rows)]), mask)
        else:
            yield Batch(index, None)
