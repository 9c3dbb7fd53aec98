"""Approximate search in a store, by the inverted lists of faiss (`pip install faiss-cpu`).

Reference: Johnson et al., "Billion-scale similarity search with GPUs", IEEE Transactions on Big Data 7, 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import numbers
from .manifest import StoreError
from .queries import Queries, Store, Top

_ROWS = 4096


@dataclass(frozen=True)
class Index:
    """An index for approximate nearest neighbour search: stored examples in inverted lists, in memory."""

    store: Store
    """The store it indexes."""
    by: Literal["dot", "cosine"]
    """The similarity."""
    lists: Any
    """The index of faiss."""

    def top(self, queries: Queries, count: int, *, probes: int = 16) -> Top:
        """The top-k stored examples among those in the nearest lists.

        Args:
            queries: of M test examples, from `Store.features`.
            count: k, from 1 to the number of stored examples; places that the lists do not fill have the index -1.
            probes: lists searched per test example, at least 1: more raise the recall and the time.

        Returns:
            The largest scores and their indices, (M, k) each.

        Raises:
            ValueError: an argument does not fit.
        """
        if not 1 <= count <= len(self.store) or probes < 1:
            raise ValueError(f"index.top: count from 1 to {len(self.store)}, probes from 1. Found {count}, {probes}.")
        self.lists.nprobe = probes
        scores, indices = self.lists.search(_vectors(self.store, list(queries.rows), self.by), count)
        return Top(torch.from_numpy(scores), torch.from_numpy(indices).long())

    def recall(self, queries: Queries, count: int, *, probes: int = 16) -> float:
        """The recall of the approximate top-k, measured against the exact one.

        Args:
            queries, count, probes: as in `top`.

        Returns:
            From 0 to 1: the fraction of the exact top-k that is found, averaged over test examples.
        """
        exact, approximate = self.store.top(queries, count, by=self.by), self.top(queries, count, probes=probes)
        hits = (exact.indices[:, :, None] == approximate.indices[:, None, :]).any(2)
        return float(hits.double().mean())


def index(store: Store, *, by: Literal["dot", "cosine"] = "dot", lists: int | None = None) -> Index:
    """An index of a store for approximate nearest neighbour search. It needs `faiss-cpu`.

    Args:
        store: a store whose checkpoints' weights are all at least 0.
        by: the similarity, "dot" or "cosine".
        lists: the number of inverted lists, at least 1; by default the square root of the number of examples.

    Returns:
        The index, in memory.

    Raises:
        StoreError: faiss is not installed, or a weight is below 0.
        ValueError: `by` is neither "dot" nor "cosine".

    Cost: memory of all features in float32, pairs multiplied out.

    Reference: Johnson, Douze, Jégou, "Billion-scale similarity search with GPUs", IEEE Transactions on Big Data 7,
        2021.
    """
    if by not in ("dot", "cosine"):
        raise ValueError(f"store.index: by must be dot or cosine. Found {by!r}.")
    try:
        faiss: Any = import_module("faiss")
    except ImportError as error:
        raise StoreError("Approximate search needs faiss. Found none. Install faiss-cpu, or search exactly.") from error
    if min(one.weight for one in store.plan.checkpoints) < 0:
        raise StoreError(f"{store.folder}: approximate search needs weights of at least 0. Found one below.")
    count = max(1, round(math.sqrt(len(store)))) if lists is None else lists
    width = numbers.dense_width(store.plan.blocks) * len(store.plan.checkpoints)
    lists_of = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, count, faiss.METRIC_INNER_PRODUCT)
    parts = [
        _vectors(store, [store.rows(c, at, at + _ROWS) for c in range(len(store.plan.checkpoints))], by)
        for at in range(0, len(store), _ROWS)
    ]
    vectors = np.concatenate(parts)
    lists_of.train(vectors[:: max(1, len(vectors) // (64 * count))])
    lists_of.add(vectors)
    return Index(store, by, lists_of)


def _vectors(store: Store, rows: list[Tensor], by: str) -> Any:
    """One vector per example, whose inner products are the scores."""
    columns = [
        numbers.dense(part, store.plan.blocks) * one.weight**0.5
        for one, part in zip(store.plan.checkpoints, rows, strict=True)
    ]
    vectors = torch.cat(columns, 1)
    if by == "cosine":
        lengths = torch.linalg.vector_norm(vectors.double(), dim=1, keepdim=True)
        vectors = torch.where(lengths > 0, vectors / lengths, 0.0).float()
    return vectors.contiguous().numpy()
