"""Which examples an epoch draws, in which order, and the key of each draw.

All of it is a function of the key in the state and the epoch. The key is split in two: the first orders examples, into
the second the step and the example are folded, which gives the example's key for dropout and augmentation.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import data, random
from ..arguments import shown

Order: TypeAlias = Callable[[Tensor, int], Tensor]
"""`order(key, epoch) -> (N,) int64`: the indices of the N examples of an epoch, possibly with repetitions."""


class Draws(NamedTuple):
    """The examples of an epoch, in the order in which steps see them."""

    examples: Tensor
    """(*lead, N) int64: the index of each."""
    keys: Tensor
    """(*lead, N, 2): the key of each, in the step that sees it."""


def epoch_draws(key: Tensor, examples: int, *, epoch: int, batch_size: int, order: Order | None = None) -> Draws:
    """The examples of an epoch and their keys, as `fit` draws them.

    Args:
        key: (*lead, 2), of the state; with `order` (2,).
        examples: N, at least 1.
        epoch: the number of the epoch, from 0.
        batch_size: examples in a step, at least 1.
        order: the examples of an epoch; by default each once, shuffled.

    Returns:
        Indices (*lead, N) and keys (*lead, N, 2).

    Raises:
        TypeError, ValueError: the order is not (N,) int64, or names examples that there are not.

    Guarantees: the key of an example's first draw in an epoch is `fold_in(fold_in(root, step), example)`, with `root`
        the second of `split(key)`; that of its r-th repetition in the epoch folds in example + r N.

    Example:
        >>> epoch_draws(random.key(0), 4, epoch=0, batch_size=2).examples.sort().values
        tensor([0, 1, 2, 3])
    """
    order_key, noise_key = random.split(key).unbind(-2)
    if order is None:
        drawn = data.epoch_order(examples, key=order_key, epoch=epoch)
        numbers = drawn
    else:
        drawn = order(order_key, epoch)
        if not isinstance(drawn, Tensor):
            raise TypeError(f"fit: an order must be int64 ({examples},). Found {shown(drawn)}.")
        if drawn.shape != (examples,) or drawn.dtype != torch.int64:
            raise ValueError(f"fit: an order must be int64 ({examples},). Found {drawn.dtype} {tuple(drawn.shape)}.")
        if not 0 <= int(drawn.min()) <= int(drawn.max()) < examples:
            raise ValueError(
                f"fit: an order must have numbers in [0, {examples}). Found {int(drawn.min())} to {int(drawn.max())}."
            )
        numbers = drawn + examples * _repetitions(drawn)
    first_step = epoch * data.steps_per_epoch(examples, batch_size)
    steps = first_step + torch.arange(examples, device=key.device) // batch_size
    return Draws(drawn, random.fold_in(random.fold_in(noise_key[..., None, :], steps), numbers))


def _repetitions(drawn: Tensor) -> Tensor:
    """The number of earlier draws of each draw's example: (N,)."""
    values, positions = drawn.sort(stable=True)
    places = torch.arange(len(drawn), device=drawn.device)
    first = torch.cat([values.new_ones(1, dtype=torch.bool), values[1:] != values[:-1]])
    begun = torch.where(first, places, 0).cummax(0).values
    return torch.empty_like(drawn).scatter_(0, positions, places - begun)
