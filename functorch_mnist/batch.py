"""A batch: tensors with one leading size B, and a mask (B,) bool, `False` in rows that do not count."""

from collections.abc import Sequence

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

    Example:
        >>> check("step", (torch.zeros(3, 2), torch.zeros(3)), None)
        3
    """
    shapes = [tuple(rows.shape) for rows in batch]
    if not all(shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"{where}: all tensors of a batch must have one leading size B. Found shapes {shapes}.")
    count = shapes[0][0]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (count,)):
        raise ValueError(f"{where}: the mask must be bool ({count},). Found {mask.dtype} {tuple(mask.shape)}.")
    return count


def masked(rows: Tensor, mask: Tensor) -> Tensor:
    """(B, …) with exact zeros where the mask (B,) is `False`: a NaN there would outlive a multiplication by zero."""
    zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
    return torch.where(mask.view(-1, *[1] * (rows.dim() - 1)), rows, zero)


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
