"""Which examples a step sees, and the fixed shapes that they are put into.

    Poisson      example i joins step t if word(key_t, i) < q 2³²        each by an own coin, n examples vary
    Shuffled     the t-th part of a permutation drawn for the epoch

A draw is cut into chunks of a few fixed sizes, padded and masked, so nothing is compiled twice, however many examples
came. No example is left out: a large draw has more chunks, an empty one is a chunk of padding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import random
from ..data import Batch
from .mechanism import Mechanism, Poisson

_WORDS = 2**32


def expected_examples(mechanism: Mechanism, examples: int) -> float:
    """The expected number of examples of a step, by which its sums are divided: q N.

    Example:
        >>> expected_examples(Poisson(0.004, 1.0), 60_000)
        240.0
    """
    return examples * mechanism.rate if isinstance(mechanism, Poisson) else examples / mechanism.steps_per_epoch


def joins(key: Tensor, examples: int, rate: float) -> Tensor:
    """Which examples a Poisson draw takes: (N,) bool, each by an own coin with the chance `rate`.

    Guarantees: the chance is never above `rate`, and below it by less than 2⁻³².

    Example:
        >>> joins(random.key(0), 3, 1.0)
        tensor([True, True, True])
    """
    words = random.bits(key, (examples,))
    least = -(_WORDS // 2)  # a word's order as a signed number, which is as uniform
    return words.long() < least + math.floor(rate * _WORDS)


def draw(mechanism: Mechanism, key: Tensor, *, step: int, examples: int) -> Tensor:
    """The numbers of the examples that a step sees: (n,) int64.

    Args:
        mechanism: says how they are sampled.
        key: (2,), the root of all draws of a run.
        step: which step, from 0.
        examples: N.

    Guarantees: a function of its arguments alone. Poisson draws are independent; in a shuffled epoch each example is
        drawn once.

    Example:
        >>> len(draw(Poisson(1e-9, 1.0), random.key(0), step=0, examples=1000))
        0
    """
    if isinstance(mechanism, Poisson):
        return joins(random.fold_in(key, step), examples, mechanism.rate).nonzero()[:, 0]
    epoch, part = divmod(step, mechanism.steps_per_epoch)
    return random.permutation(random.fold_in(key, epoch), examples).tensor_split(mechanism.steps_per_epoch)[part]


def chunks(drawn: Tensor, sizes: Sequence[int]) -> list[Batch]:
    """A draw as batches of fixed sizes, with masks.

    Args:
        drawn: (n,) int64, n from 0.
        sizes: one or two sizes of chunks, at least 1, the larger first.

    Returns:
        Batches, at least one, the last of them of the larger size. What goes beyond the larger chunks goes into smaller
        ones, or, where these would be as long together, into one more large one.

    Raises:
        ValueError: the sizes are not one or two, or out of order.

    Guarantees: each drawn example is in one row whose mask is True.

    Example:
        >>> [len(batch.examples) for batch in chunks(torch.arange(70), (64, 8))]
        [8, 64]
    """
    if not 1 <= len(sizes) <= 2 or not 0 < sizes[-1] <= sizes[0]:
        raise ValueError(f"chunks: one or two sizes of at least 1, the larger first. Found {tuple(sizes)}.")
    large, small = sizes[0], sizes[-1]
    whole = max(1, len(drawn) // large)
    rest = max(0, len(drawn) - whole * large)
    lengths = [small] * -(-rest // small)
    if sum(lengths) >= large:
        lengths = [large]
    batches, start = [], 0
    for size in (*lengths, *[large] * whole):
        index = drawn[start : start + size]
        start += len(index)
        mask = torch.arange(size, device=drawn.device) < len(index)
        batches.append(Batch(torch.cat([index, index.new_zeros(size - len(index))]), mask))
    return batches
