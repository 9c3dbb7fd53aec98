"""Groups of examples: whose an example is, by integers (B,).

Any integers are allowed, so how many groups there are is not known from shapes: what is of a group stands in the row of
each of its examples. Its first row stands for it where a group counts once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import native


def checked(where: str, group: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """`firsts` of what a caller gave.

    Raises:
        TypeError: `group` is no tensor of integers.
        ValueError: it is not (B,).
    """
    if not isinstance(group, Tensor) or group.is_floating_point() or group.is_complex() or group.dtype == torch.bool:
        found = group.dtype if isinstance(group, Tensor) else type(group).__name__
        raise TypeError(f"{where}: group must be a tensor of integers, whose each example is. Found {found}.")
    if group.shape != (count,):
        raise ValueError(f"{where}: group must be ({count},). Found {tuple(group.shape)}.")
    return firsts(group, mask)


def firsts(group: Tensor, mask: Tensor | None = None) -> Tensor:
    """The first row of each row's group: (B,) in [0, B), which say of the same groups whose a row is.

    Args:
        group: (B,) integers.
        mask: (B,) bool; a row with False is a group of its own.

    Example:
        >>> firsts(torch.tensor([48213, -7, 48213, -7]), torch.tensor([False, True, True, True]))
        tensor([0, 1, 2, 1])
    """
    order = group.long().argsort(stable=True)
    if mask is not None:
        order = order[mask[order].to(torch.int8).argsort(stable=True)]
    ids = group.long()[order]
    starts = torch.cat([torch.ones_like(ids[:1], dtype=torch.bool), ids[1:] != ids[:-1]])
    if mask is not None:
        before = torch.cat([torch.zeros_like(mask[:1]), mask[order][:-1]])  # a row with True follows one with False
        starts = starts | ~mask[order] | ~before
    places = torch.arange(len(ids), device=ids.device)
    begins = torch.where(starts, places, 0).cummax(0).values if len(ids) else places
    return torch.zeros_like(places).scatter(0, order, order[begins])


def leads(first: Tensor) -> Tensor:
    """The rows that stand for their groups: (B,) bool, of what `firsts` gives."""
    return first == torch.arange(len(first), device=first.device)


def summed(first: Tensor, rows: Tensor) -> Tensor:
    """The sums of (B, …) over each row's group, in its row, of what `firsts` gives."""
    return torch.zeros_like(rows).index_add(0, first, rows)[first]


class Alike(NamedTuple):
    """Groups of one size."""

    groups: Tensor
    """(K,): their numbers."""
    rows: Tensor
    """(K size,): the rows of one after those of another."""
    size: int


class Members(NamedTuple):
    """The rows of each group, for a program that may look at sizes."""

    groups: int
    """How many."""
    number: Tensor
    """(B,): that of each row's group, in the order of their first rows."""
    alike: tuple[Alike, ...]
    """All groups, by their size."""


def members(first: Tensor) -> Members:
    """The rows of each group, of what `firsts` gives."""
    _, number, sizes = first.unique(return_inverse=True, return_counts=True)
    order, starts = number.argsort(stable=True), sizes.cumsum(0) - sizes
    alike = []
    for size in sorted(set(sizes.tolist())):
        groups = (sizes == size).nonzero().squeeze(1)
        rows = order[(starts[groups][:, None] + torch.arange(size, device=first.device)).flatten()]
        alike.append(Alike(groups, rows, size))
    return Members(len(sizes), number, tuple(alike))


class Groups(NamedTuple):
    """What is known of the groups of a batch."""

    first: Tensor
    """(B,): what `firsts` gives."""
    members: Members | None
    """None for a program that may not look at sizes."""


def groups(group: Tensor) -> Groups:
    """The groups of a batch, of integers (B,)."""
    first = firsts(group)
    return Groups(first, members(native.beneath(first)) if may_look(first) else None)


def may_look(group: Tensor) -> bool:
    """Whether sizes may be looked at now: not while a program is compiled or recorded, nor under `vmap` over ids."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    known = native.numbers(group)
    return known is not None and known.dim() == 1


def packed(where: str, first: Tensor, size: int) -> tuple[Tensor, list[slice]]:
    """An order of the rows (B,) in which groups lie together, and parts of it of up to `size` rows, of whole groups.

    Raises:
        ValueError: a group has more rows than `size`, or nobody may look.
    """
    if not may_look(first):
        raise ValueError(
            f"{where}: with group, a chunk_size below B needs the sizes of groups, which a compiler or a vmap over "
            f"group does not know. Found {size} for {len(first)} rows. Leave chunk_size out."
        )
    first = native.beneath(first)
    sizes = torch.bincount(first, minlength=len(first))
    largest = int(sizes.max())
    if largest > size:
        raise ValueError(
            f"{where}: a chunk takes whole groups. Found a group of {largest} rows, chunk_size {size}. Raise it."
        )
    parts, start, stop = [], 0, 0
    for count in sizes[sizes > 0].tolist():
        if stop + count - start > size:
            parts.append(slice(start, stop))
            start = stop
        stop += count
    return first.argsort(stable=True), [*parts, slice(start, stop)]
