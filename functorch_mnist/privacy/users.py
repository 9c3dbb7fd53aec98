"""User-level differential privacy: users are sampled as a whole, each with a bounded number of examples.

    user u joins step t independently with probability q, with at most `max_examples` of its examples, drawn uniformly

A user's examples stay in one chunk, where its summed gradient is clipped: so a user moves a sum by at most the
sensitivity. Neighbours differ by a user.

Reference: McMahan, Ramage, Talwar, Zhang, "Learning differentially private recurrent language models", ICLR 2018,
    algorithm 1; Charles et al., "Fine-tuning large language models with user-level differential privacy", arXiv
    2407.07737, which finds sampling users better than sampling examples.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import random
from ..data import Batch
from .mechanism import Mechanism, Poisson, check_count
from .sampling import Draw, check_sizes, padded, sizes_of


class Users:
    """The user of each example of a data set, for user-level privacy."""

    def __init__(self, ids: Tensor, *, max_examples: int) -> None:
        """Orders the examples by their users.

        Args:
            ids: (N,) int64, N at least 1: the user of each example, any whole numbers.
            max_examples: the most examples of a user in a step, at least 1.

        Raises:
            TypeError: `ids` is no int64 tensor, or `max_examples` no int.
            ValueError: `ids` is not (N,), or `max_examples` is below 1.

        Example:
            >>> len(Users(torch.tensor([7, 7, 3]), max_examples=1))
            2
        """
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise TypeError(f"Users: ids must be an int64 tensor. Found {getattr(ids, 'dtype', type(ids).__name__)}.")
        if ids.dim() != 1 or not len(ids):
            raise ValueError(f"Users: ids must be (N,), N at least 1. Found {tuple(ids.shape)}.")
        check_count("Users", "max_examples", max_examples)
        self.ids, self.max_examples = ids, max_examples
        _, self._user, counts = ids.unique(return_inverse=True, return_counts=True)
        self._order = self._user.argsort(stable=True)
        self._ends = counts.cumsum(0)
        self._counts = counts

    def __len__(self) -> int:
        """The number of users."""
        return len(self._counts)

    def rows(self, drawn: Draw, key: Tensor) -> list[Tensor]:
        """The examples of each user of a draw: at most `max_examples`, drawn uniformly by the key.

        Args:
            drawn: users, by their rank in the order of their ids.
            key: (2,), of this step and of nothing else.

        Returns:
            For each user the indices of its examples, (n,) int64, n from 1 to `max_examples`.
        """
        words = random.bits(key, (len(self.ids),)).long()
        found = []
        for user in drawn.numbers.tolist():
            end, count = int(self._ends[user]), int(self._counts[user])
            rows = self._order[end - count : end]
            found.append(
                rows if count <= self.max_examples else rows[words[rows].argsort(stable=True)[: self.max_examples]]
            )
        return found

    def chunk_sizes(self, mechanism: Mechanism, *, rows: int = 1024) -> tuple[int, ...]:
        """A few sizes for `chunks`, with little padding. Each holds the examples of any user, so it may exceed `rows`.

        Args:
            mechanism: says how users are sampled.
            rows: examples of a chunk, at least 1: what memory allows.

        Returns:
            Sizes, smallest first.
        """
        taken = self._counts.clamp(max=self.max_examples).double()
        expected = mechanism.sampling_rate * float(taken.sum())
        rate = mechanism.rate if isinstance(mechanism, Poisson) else 1.0
        deviation = math.sqrt(rate * (1 - rate) * float(taken.square().sum()))
        most = int(taken.max())
        return tuple(sorted({max(size, most) for size in sizes_of(expected, deviation, max(rows, most))}))

    def chunks(self, drawn: Draw, key: Tensor, sizes: Sequence[int]) -> list[Batch]:
        """The examples of a draw's users as batches of fixed sizes, with masks; each user is in one batch.

        Args:
            drawn: users, by their rank in the order of their ids.
            key: (2,), of this step, as for `rows`.
            sizes: sizes of chunks, at least one; the largest holds the examples of any user.

        Returns:
            Batches, at least one.

        Raises:
            ValueError: there is no size, or the largest does not hold a user's examples.
        """
        check_sizes(sizes)
        if max(sizes) < self.max_examples and max(sizes) < int(self._counts.max()):
            raise ValueError(
                f"Users.chunks: the largest size must hold a user's examples, {self.max_examples} at most. "
                f"Found {max(sizes)}."
            )
        packed: list[list[Tensor]] = [[]]
        free = max(sizes)
        for rows in self.rows(drawn, key):
            if len(rows) > free:
                packed.append([])
                free = max(sizes)
            packed[-1].append(rows)
            free -= len(rows)
        return [padded(torch.cat(parts) if parts else self._order[:0], sizes) for parts in packed]
