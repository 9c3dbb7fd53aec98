"""Sampling: the examples of each step, and the fixed shapes of their chunks.

    Poisson      example i joins step t if word(key_t, i) < q 2³²        independently; the number of examples varies
    BandMF       the same with probability b q, if word(key, i) mod b = t mod b
    Shuffled     the t-th part of a permutation drawn for the epoch
    FixedOrder   the t-th part of a permutation drawn for all epochs

A draw is cut into chunks of a few fixed sizes, padded and masked, so that each size is compiled once, whatever the
number of examples. No example is left out: a large draw has more chunks, an empty one is a chunk of padding.
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
"""Folded into the root of all draws for what is drawn once per run: no step has this number."""
_LARGEST, _NEXT, _BETWEEN = 3.0, 1.5, 3.75
"""Where k sizes pad a normal number of examples nearly least, in its standard deviations from the expected one: the
largest, the next one, and from there down a k-th of the last each."""
_ALIGNED = 8
"""Sizes from 64 on are its multiples, on which convolutions were 2 % faster."""


def poisson_mask(key: Tensor, step: int | Tensor, examples: int, rate: float) -> Tensor:
    """The examples of a step under Poisson sampling, each independently with probability q.

    Args:
        key: (2,), the root of all draws of a run.
        step: the number of the step, from 0, an int or a 0-d tensor.
        examples: N.
        rate: q in (0, 1].

    Returns:
        (N,) bool.

    Guarantees: the probability is never above `rate`, and below it by less than 2⁻³².

    Example:
        >>> poisson_mask(random.key(0), 7, 3, 1.0)
        tensor([True, True, True])
    """
    words = random.bits(random.fold_in(key, step), (examples,))
    least = -(_WORDS // 2)  # a word's order as a signed number, which is as uniform
    return words.long() < least + math.floor(rate * _WORDS)


@dataclass(frozen=True)
class Draw:
    """The examples, or users, of a step, each at most once.

    Raises:
        ValueError: the numbers are not (n,) int64 and increasing.
    """

    numbers: Tensor
    """(n,) int64 from 0, increasing: the indices of the examples, or of the users."""

    def __post_init__(self) -> None:
        """Refuses an example that is drawn twice.

        Raises:
            ValueError: one is.
        """
        numbers = self.numbers
        if numbers.dim() != 1 or numbers.dtype != torch.int64 or bool((numbers[1:] <= numbers[:-1]).any()):
            raise ValueError(
                "Draw: numbers must be (n,) int64 and increase, for an example drawn twice moves a sum by twice the "
                f"sensitivity. Found {numbers.dtype} {tuple(numbers.shape)}, {numbers.flatten()[:8].tolist()}. Take "
                "privacy.draw: draws with repetition or with weights have no account."
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
    """The examples, or users, of a step.

    Args:
        mechanism: says how they are sampled.
        key: (2,), the root of all draws of a run.
        step: the number of the step, from 0, an int or a 0-d tensor.
        population: N, the number of examples, or of users.
        mask_fn: `poisson_mask`, or a compiled form of it.

    Returns:
        The indices of those in the step.

    Raises:
        TypeError: `mechanism` is none, such as a rate.

    Guarantees: a function of its arguments alone. Poisson draws are independent over steps and examples; in a shuffled
        epoch each example is drawn once.

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
    """A few sizes for `chunks`, with little padding for the draws of a mechanism.

    Args:
        mechanism: says how examples are sampled.
        examples: N, at least 1.
        max_size: examples of a chunk at most, at least 1: what memory allows. It is Opacus's physical batch size.
        count: the number of sizes at most, at least 1.

    Returns:
        Sizes, smallest first. All chunks of a draw but the last have the largest.

    Raises:
        ValueError: a number is out of its range.
        TypeError: `mechanism` is none, such as a rate.

    Cost: a compiled step is compiled once per size. For 256 expected examples five sizes pad 3 % of rows, eight 2 %,
        which pays in long runs.

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
    """Sizes of chunks of at most `most` rows, smallest first, for draws of a given mean and standard deviation."""
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
        sizes: sizes of chunks, at least one, each at least 1.

    Returns:
        Batches, at least one: full ones of the largest size, and one of the smallest size that holds the rest.

    Raises:
        TypeError: `drawn` is no `Draw`.
        ValueError: there is no size, or one is below 1.

    Guarantees: each drawn example is in exactly one row whose mask is True.

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
