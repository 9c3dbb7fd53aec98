"""Which examples an epoch draws, in which order, and the key of each draw.

All of it hangs on the key in the state and the epoch alone. The key is split in two: one half orders examples, the
other is folded with the step and the example to the key of dropout and augmentation.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import data, random
from ..arguments import shown

Order: TypeAlias = Callable[[Tensor, int], Tensor]
"""`order(key, epoch) -> (N,) int64`: as many examples as there are, some of them perhaps several times."""


class Draws(NamedTuple):
    """An epoch's draws, one after the other."""

    examples: Tensor
    """(*lead, N) int64: which example each is."""
    keys: Tensor
    """(*lead, N, 2): the key of each in the step that sees it."""


def epoch_draws(key: Tensor, examples: int, *, epoch: int, batch_size: int, order: Order | None = None) -> Draws:
    """The draws of an epoch.

    Args:
        key: (*lead, 2), of the state; with `order` (2,).
        examples: N.
        epoch: which one, from 0.
        batch_size: draws in a step.
        order: which examples an epoch sees; by default each once, at random.

    Raises:
        TypeError, ValueError: the order is not (N,) int64, or names examples that there are not.

    Guarantees: the key of an example's first draw in an epoch is `fold_in(fold_in(half, step), example)`; that of its
        r-th repetition in the epoch folds in example + r N.
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
    """How often each draw's example was drawn before: (N,)."""
    values, positions = drawn.sort(stable=True)
    places = torch.arange(len(drawn), device=drawn.device)
    first = torch.cat([values.new_ones(1, dtype=torch.bool), values[1:] != values[:-1]])
    begun = torch.where(first, places, 0).cummax(0).values
    return torch.empty_like(drawn).scatter_(0, positions, places - begun)
