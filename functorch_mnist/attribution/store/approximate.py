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
    """Stored examples in lists of near ones, in memory."""

    store: Store
    by: Literal["dot", "cosine"]
    lists: Any
    """faiss' own index."""

    def top(self, queries: Queries, count: int, *, probes: int = 16) -> Top:
        """The stored examples with the largest scores among those in the nearest lists.

        Args:
            queries: of M test examples, from `Store.features`.
            count: k, at least 1; places that the lists do not fill have the index -1.
            probes: lists that are searched for each test example: more find more, and take longer.

        Raises:
            ValueError: an argument does not fit.
        """
        if not 1 <= count <= len(self.store) or probes < 1:
            raise ValueError(f"index.top: count from 1 to {len(self.store)}, probes from 1. Found {count}, {probes}.")
        self.lists.nprobe = probes
        scores, found = self.lists.search(_vectors(self.store, list(queries.rows), self.by), count)
        return Top(torch.from_numpy(scores), torch.from_numpy(found).long())

    def recall(self, queries: Queries, count: int, *, probes: int = 16) -> float:
        """The part of the stored examples with the largest scores that is found, by comparing with all."""
        exact, found = self.store.top(queries, count, by=self.by), self.top(queries, count, probes=probes)
        hits = (exact.indices[:, :, None] == found.indices[:, None, :]).any(2)
        return float(hits.double().mean())


def index(store: Store, *, by: Literal["dot", "cosine"] = "dot", lists: int | None = None) -> Index:
    """An index of a store for approximate search.

    Args:
        store: all weights of its checkpoints at least 0.
        by: how examples are compared.
        lists: how many; by default the square root of the number of examples.

    Raises:
        StoreError: faiss is not installed, or a weight is below 0.

    Cost: memory of all features in float32, pairs multiplied out.
    """
    try:
        faiss: Any = import_module("faiss")
    except ImportError as error:
        raise StoreError("Approximate search needs faiss. Found none. Install faiss-cpu, or search exactly.") from error
    if min(one.weight for one in store.plan.checkpoints) < 0:
        raise StoreError(f"{store.folder}: approximate search needs weights of at least 0. Found one below.")
    count = max(1, round(math.sqrt(len(store)))) if lists is None else lists
    width = numbers.dense_width(store.plan.blocks) * len(store.plan.checkpoints)
    found = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, count, faiss.METRIC_INNER_PRODUCT)
    parts = [
        _vectors(store, [store.rows(c, at, at + _ROWS) for c in range(len(store.plan.checkpoints))], by)
        for at in range(0, len(store), _ROWS)
    ]
    vectors = np.concatenate(parts)
    found.train(vectors[:: max(1, len(vectors) // (64 * count))])
    found.add(vectors)
    return Index(store, by, found)


def _vectors(store: Store, rows: list[Tensor], by: str) -> Any:
    """One vector of each example, whose inner products are the scores."""
    columns = [
        numbers.dense(part, store.plan.blocks) * one.weight**0.5
        for one, part in zip(store.plan.checkpoints, rows, strict=True)
    ]
    vectors = torch.cat(columns, 1)
    if by == "cosine":
        lengths = torch.linalg.vector_norm(vectors.double(), dim=1, keepdim=True)
        vectors = torch.where(lengths > 0, vectors / lengths, 0.0).float()
    return vectors.contiguous().numpy()
