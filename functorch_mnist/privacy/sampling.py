"""Which examples a step sees, and the fixed shapes that they are put into.

    Poisson      example i joins step t if word(key_t, i) < q 2³²        each by an own coin, n examples vary
    BandMF       the same with chance b q, if word(key, i) mod b = t mod b
    Shuffled     the t-th part of a permutation drawn for the epoch
    FixedOrder   the t-th part of a permutation drawn for all epochs

A draw is cut into chunks of a few fixed sizes, padded and masked, so nothing is compiled twice, however many examples
came. No example is left out: a large draw has more chunks, an empty one is a chunk of padding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import random
from ..data import Batch
from .mechanism import BandMF, FixedOrder, Mechanism, Poisson, check_mechanism

_WORDS = 2**32
_ALWAYS = 2**32 - 1
"""Folded into the root of all draws for what is drawn once: no step has this number."""
_LARGEST, _NEXT, _BETWEEN = 3.0, 1.5, 3.75
"""Where k sizes pad a normal number of examples nearly least, in its standard deviations from the expected one: the
largest, the next one, and from there down a k-th of the last each."""
_ALIGNED = 8
"""Sizes from 64 on are its multiples, on which convolutions were 2 % faster."""


def poisson_mask(key: Tensor, step: int | Tensor, examples: int, rate: float) -> Tensor:
    """Which examples a Poisson draw takes: (N,) bool, each by an own coin with the chance `rate`.

    Args:
        key: (2,), the root of all draws of a run.
        step: which step, from 0.
        examples: N.
        rate: q in (0, 1].

    Guarantees: the chance is never above `rate`, and below it by less than 2⁻³².

    Example:
        >>> poisson_mask(random.key(0), 7, 3, 1.0)
        tensor([True, True, True])
    """
    words = random.bits(random.fold_in(key, step), (examples,))
    least = -(_WORDS // 2)  # a word's order as a signed number, which is as uniform
    return words.long() < least + math.floor(rate * _WORDS)


@dataclass(frozen=True)
class Draw:
    """Who joins a step: each at most once."""

    numbers: Tensor
    """(n,) int64 from 0, increasing."""

    def __post_init__(self) -> None:
        """Refuses what is drawn twice.

        Raises:
            ValueError: it is.
        """
        found = self.numbers
        if found.dim() != 1 or found.dtype != torch.int64 or bool((found[1:] <= found[:-1]).any()):
            raise ValueError(
                "Draw: numbers must be (n,) int64 and increase, for who is drawn twice moves a sum by twice the "
                f"sensitivity. Found {found.dtype} {tuple(found.shape)}, {found.flatten()[:8].tolist()}. Take "
                "privacy.draw: what repeats, or is weighted, has no account."
            )

    def __len__(self) -> int:
        return len(self.numbers)


def draw(
    mechanism: Mechanism,
    key: Tensor,
    *,
    step: int | Tensor,
    population: int,
    mask_fn: Callable[..., Tensor] = poisson_mask,
) -> Draw:
    """Who joins a step.

    Args:
        mechanism: says how examples, or users, are sampled.
        key: (2,), the root of all draws of a run.
        step: which step, from 0.
        population: N, the number of all.
        mask_fn: `poisson_mask`, or a compiled form of it.

    Guarantees: a function of its arguments alone. Poisson draws are independent; in a shuffled epoch each example is
        drawn once.

    Example:
        >>> len(draw(Poisson(1e-9, 1.0), random.key(0), step=0, population=1000))
        0
    """
    check_mechanism("draw", mechanism)
    if isinstance(mechanism, Poisson):
        return Draw(mask_fn(key, step, population, mechanism.rate).nonzero()[:, 0])
    always = random.fold_in(key, _ALWAYS)
    if isinstance(mechanism, BandMF):
        group = random.bits(always, (population,)).long() % mechanism.bands
        joined = mask_fn(key, step, population, mechanism.chance) & (group == step % mechanism.bands)
        return Draw(joined.nonzero()[:, 0])
    epoch, part = divmod(int(step), mechanism.steps_per_epoch)
    order = random.permutation(always if isinstance(mechanism, FixedOrder) else random.fold_in(key, epoch), population)
    return Draw(order.tensor_split(mechanism.steps_per_epoch)[part].sort().values)


def chunk_sizes(mechanism: Mechanism, examples: int, *, max_size: int = 1024, count: int = 5) -> tuple[int, ...]:
    """A few sizes for `chunks` that pad the draws of a mechanism little.

    Args:
        mechanism: says how examples are sampled.
        examples: N, at least 1.
        max_size: how many examples to take at once, at least 1: what memory allows.
        count: how many sizes, at least 1.

    Returns:
        Sizes of chunks, smallest first: of all but the last chunk the largest one.

    Raises:
        ValueError: a number is out of its range.

    Cost: what is compiled is compiled once for each size. For 256 expected examples five sizes pad 3 % of rows, eight
        2 %: worth it in long runs.

    Example:
        >>> chunk_sizes(Poisson(256 / 60_000, 1.0), 60_000)
        (248, 256, 272, 280, 304)
    """
    check_mechanism("chunk_sizes", mechanism)
    if min(examples, max_size, count) < 1:
        raise ValueError(
            f"chunk_sizes: examples, max_size and count must be at least 1. Found {examples}, {max_size} and {count}."
        )
    expected = mechanism.sampling_rate * examples
    varies = isinstance(mechanism, (Poisson, BandMF))
    deviation = math.sqrt(expected * (1 - mechanism.sampling_rate)) if varies else 0.0
    return sizes_of(expected, deviation, max_size, count)


def sizes_of(expected: float, deviation: float, most: int, count: int = 5) -> tuple[int, ...]:
    """Sizes of chunks, smallest first, for draws of so many rows, up to `most` rows in one."""
    longest = math.ceil(expected + _LARGEST * deviation)
    unit = _ALIGNED if longest >= 8 * _ALIGNED and deviation else 1
    largest = math.ceil(longest / math.ceil(longest / most) / unit) * unit
    apart = [0.0, *[_LARGEST - _NEXT + k * _BETWEEN / count for k in range(count - 1)]]
    below = {round(z * deviation / unit) * unit for z in apart}
    return tuple(sorted({max(1, largest - less) for less in below}))


def chunks(drawn: Draw, sizes: Sequence[int]) -> list[Batch]:
    """A draw of examples as batches of fixed sizes, with masks.

    Args:
        drawn: n examples, n from 0.
        sizes: sizes of chunks, at least one of at least 1.

    Returns:
        Batches, at least one: whole ones of the largest size, and the smallest that holds the rest.

    Raises:
        TypeError: it is no draw.
        ValueError: there is no size, or one below 1.

    Guarantees: each drawn example is in one row whose mask is True.

    Example:
        >>> [len(batch.examples) for batch in chunks(Draw(torch.arange(70)), (8, 64))]
        [64, 8]
    """
    if not isinstance(drawn, Draw):
        raise TypeError(f"chunks: it must be a Draw, of which each is drawn once. Found {type(drawn).__name__}.")
    check_sizes(sizes)
    return [padded(part, sizes) for part in drawn.numbers.split(max(sizes)) or [drawn.numbers]]


def padded(rows: Tensor, sizes: Sequence[int]) -> Batch:
    """Rows (n,) as a batch of the smallest size that holds them."""
    size = min(size for size in sizes if size >= len(rows))
    mask = torch.arange(size, device=rows.device) < len(rows)
    return Batch(torch.cat([rows, rows.new_zeros(size - len(rows))]), mask)


def check_sizes(sizes: Sequence[int]) -> None:
    """Refuses sizes of chunks that hold nothing.

    Raises:
        ValueError: there is none, or one below 1.
    """
    if min(sizes, default=0) < 1:
        raise ValueError(f"chunks: at least one size, each at least 1. Found {tuple(sizes)}.")
