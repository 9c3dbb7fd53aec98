"""A batch: tensors with one leading size B, and a mask (B,) bool, `False` in rows that do not count."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def check(where: str, batch: Sequence[Tensor], mask: Tensor | None) -> int:
    """The number of rows, B, of a batch that fits its mask.

    Args:
        where: the function that the error names.
        batch: tensors (B, …), at least one; B may be 0.
        mask: (B,) bool, or none.

    Raises:
        ValueError: there is no tensor, one is 0-d, they differ in B, or the mask is not (B,) bool.
        TypeError: one is no tensor.

    Example:
        >>> check("step", (torch.zeros(3, 2), torch.zeros(3)), None)
        3
    """
    for rows in batch:
        if not isinstance(rows, Tensor):
            remedy = "Pass its tensors one by one: x, y." if isinstance(rows, (tuple, list)) else "Use torch.as_tensor."
            raise TypeError(f"{where}: a batch must be tensors (B, …). Found {type(rows).__name__}. {remedy}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"{where}: the mask must be a bool tensor (B,). Found {type(mask).__name__}.")
    shapes = [tuple(rows.shape) for rows in batch]
    if not shapes:
        raise ValueError(f"{where}: a batch must have at least one tensor (B, …). Found none.")
    if not all(shapes) or len({shape[0] for shape in shapes}) != 1:
        single = any([rows.dtype == torch.int32 and rows.shape == (2,) for rows in batch])
        one = "" if all(shapes) else " One example? Pass x[None], y[None]."
        remedy = (
            "Is (2,) a single key? random.split(key, B) gives one per example."
            if single
            else f"What all examples share belongs in the loss; expand it to B rows otherwise.{one}"
        )
        raise ValueError(
            f"{where}: all tensors of a batch must have one leading size B. Found shapes {shapes}. {remedy}"
        )
    count = shapes[0][0]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (count,)):
        raise ValueError(f"{where}: the mask must be bool ({count},). Found {mask.dtype} {tuple(mask.shape)}.")
    return count


def masked(rows: Tensor, mask: Tensor) -> Tensor:
    """(B, …) with exact zeros where the mask (B,) is `False`: a NaN there would outlive a multiplication by zero."""
    zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
    order = sorted(range(1, rows.dim()), key=rows.stride, reverse=True)  # as stored: the compiler keeps that order
    kept = torch.where(mask.view(-1, *[1] * (rows.dim() - 1)), rows.permute(0, *order), zero)
    return kept.permute(0, *[1 + order.index(axis) for axis in range(1, rows.dim())])


def blanked(batch: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
    """The batch with zeros in its masked rows.

    Args:
        batch: tensors (B, …).
        mask: (B,) bool, or none for the batch itself.

    Example:
        >>> blanked((torch.tensor([1.0, float("nan")]),), torch.tensor([True, False]))
        (tensor([1., 0.]),)
    """
    if mask is None:
        return tuple(batch)
    return tuple([masked(rows, mask) for rows in batch])


class Chunk(NamedTuple):
    """Some rows of a batch, padded to the size of a chunk."""

    batch: tuple[Tensor, ...]
    mask: Tensor | None
    rows: slice
    """Which of the batch's rows they are."""

    @property
    def size(self) -> int:
        """Rows with the padding."""
        return len(self.batch[0])

    def keep(self) -> Tensor:
        """The mask, or ones: (size,) bool."""
        return torch.ones(self.size, dtype=torch.bool, device=self.batch[0].device) if self.mask is None else self.mask

    def unpadded(self, values: Tensor) -> Tensor:
        """(size, …) without the rows of the padding."""
        return values[: self.rows.stop - self.rows.start]

    def padded(self, values: Tensor) -> Tensor:
        """This chunk's rows of (B, …), with zeros in the padding."""
        part = values[self.rows]
        missing = self.size - len(part)
        return torch.cat([part, part.new_zeros((missing, *part.shape[1:]))]) if missing else part


def size_of_chunks(where: str, batch: Sequence[Tensor], mask: Tensor | None, chunk_size: int | None) -> int:
    """Rows in a chunk, at least 1 and no more than the batch has, see `chunks`."""
    total = check(where, batch, mask)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"{where}: chunk_size must be a whole number, at least 1. Found {chunk_size}.")
    return max(1, total if chunk_size is None else min(chunk_size, total))


def chunks(where: str, batch: Sequence[Tensor], mask: Tensor | None, chunk_size: int | None) -> list[Chunk]:
    """The batch in chunks of one size, the last padded; an empty batch is one chunk of padding.

    Args:
        where: the function that an error names.
        batch: tensors (B, …).
        mask: (B,) bool, or none.
        chunk_size: rows in a chunk, at least 1; by default B.

    Raises:
        ValueError: the batch does not fit, see `check`, or `chunk_size` is not a whole number, at least 1.

    Example:
        >>> [chunk.mask for chunk in chunks("here", (torch.zeros(3),), None, 2)]
        [None, tensor([ True, False])]
    """
    size = size_of_chunks(where, batch, mask, chunk_size)
    total = len(batch[0])
    found = []
    for start in range(0, max(1, total), size):
        rows = slice(start, min(start + size, total))
        found.append(padded([x[rows] for x in batch], None if mask is None else mask[rows], rows, size))
    return found


def padded(part: Sequence[Tensor], keep: Tensor | None, rows: slice, size: int) -> Chunk:
    """A chunk of some rows and their mask, padded to `size`; `rows` says which of the batch's they are."""
    missing = size - (rows.stop - rows.start)
    if missing:
        keep = part[0].new_ones(rows.stop - rows.start, dtype=torch.bool) if keep is None else keep
        keep = torch.cat([keep, keep.new_zeros(missing)])
        part = [torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) for x in part]
    return Chunk(tuple(part), keep, rows)
