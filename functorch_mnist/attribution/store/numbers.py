"""The numbers of an example: of each parameter a matrix of features, or two vectors whose outer product it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import tree
from ...per_sample import Factored, factored
from ...tree import Tree
from ..projections import Projection
from .manifest import Block


def blocks(
    loss_fn: Callable[..., Tensor], params: Tree, example: Sequence[Tensor], projection: Projection
) -> tuple[Block, ...]:
    """Where the features of each parameter are: as a pair wherever that has fewer numbers."""
    part = factored(loss_fn, params, *[x[:1] for x in example])
    found: list[Block] = []
    start = 0
    leaves = zip(tree.paths(params), tree.leaves(params), projection.maps, part.pairs(projection.maps), strict=True)
    for path, leaf, (left, right), pair in leaves:
        h, d = len(left), len(right)
        block = Block(path, tuple(leaf.shape), "pair" if pair is not None and h + d < h * d else "matrix", h, d, start)
        found.append(block)
        start = block.stop
    return tuple(found)


def features(part: Factored, projection: Projection, blocks: Sequence[Block]) -> Tensor:
    """The numbers of each example, (B, F), in the order of the blocks."""
    columns = []
    for term, block, maps in zip(part.terms, blocks, projection.maps, strict=True):
        left, right = (m.to(tree.wide(part.losses).dtype) for m in maps)
        if block.kind == "matrix":
            columns.append(term.project(left, right).flatten(1))
            continue
        pair = term.pair(left, right)
        if pair is None:
            raise ValueError(f"store: the gradient by {block.path} must be an outer product here too.")
        columns += [*_balanced(*pair)]
    return torch.cat(columns, 1)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A pair with the same outer product, whose vectors are equally long."""
    a, b = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (left, right))
    ratio = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 0.0)
    return left * ratio, right * torch.where(ratio > 0, 1 / ratio, 0.0)


def inner(mine: Tensor, theirs: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The inner products of features (N, F) and (M, F): (N, M)."""
    total = None
    for first, last in _runs(blocks):  # neighbouring matrices are one product
        part = mine[:, first:last] @ theirs[:, first:last].T
        total = part if total is None else total.add_(part)
    for block in blocks:
        if block.kind == "pair":
            (a, b), (c, d) = (_pair(x, block) for x in (mine, theirs))
            part = (a @ c.T).mul_(b @ d.T)
            total = part if total is None else total.add_(part)
    return mine.new_zeros(len(mine), len(theirs)) if total is None else total


def square_norms(rows: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The squared norms of features (N, F): (N,) float64."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for block in blocks:
        parts = [rows[:, block.start : block.stop]] if block.kind == "matrix" else _pair(rows, block)
        squares = [part.double().square().sum(1) for part in parts]
        total += squares[0] if len(squares) == 1 else squares[0] * squares[1]
    return total


def dense(rows: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The features (N, F) with pairs multiplied out."""
    columns = []
    for block in blocks:
        if block.kind == "matrix":
            columns.append(rows[:, block.start : block.stop])
        else:
            left, right = _pair(rows, block)
            columns.append((left[:, :, None] * right[:, None, :]).flatten(1))
    return torch.cat(columns, 1)


def dense_width(blocks: Sequence[Block]) -> int:
    """How many numbers `dense` has."""
    return sum(block.left * block.right for block in blocks)


def rounded(rows: Tensor, row: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Features (N, F) as rows of a file.

    Each is divided by its largest number first, so that half precision holds small gradients as well as large ones.
    """
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    scale = torch.where(largest > 0, largest, 1.0).float()
    stored = np.zeros(len(rows), row)
    stored["scale"] = scale.cpu().numpy()
    stored["values"] = (rows / scale[:, None]).cpu().numpy()
    return stored


def restored(stored: np.ndarray[Any, Any]) -> Tensor:
    """The way back: (N, F) float32."""
    values = torch.from_numpy(np.ascontiguousarray(stored["values"]))
    return values.float().mul_(torch.from_numpy(np.ascontiguousarray(stored["scale"]))[:, None])


def _pair(rows: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    left, right = rows[:, block.start : block.stop].split([block.left, block.right], 1)
    return left, right


def _runs(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """The first and the last number of matrices that stand side by side."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if block.kind == "pair":
            continue
        if runs and runs[-1][1] == block.start:
            runs[-1] = (runs[-1][0], block.stop)
        else:
            runs.append((block.start, block.stop))
    return runs
