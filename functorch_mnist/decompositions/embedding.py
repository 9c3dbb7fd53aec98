"""Bags of embeddings: rows of a table, and of the rows of a bag their sum, mean or maximum.

    y_b = Σ_{j in bag b} s_j W[x_j],  the same over the bag's size,  or  max_{j in bag b} W[x_j]

Shapes: B bags, N indices, a table of V rows of H numbers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,  # noqa: ARG001 (of max_norm)
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`F.embedding_bag`.

    Args:
        input: indices, (B, N) for B bags of N, or (N,) for consecutive bags.
        weight: (V, H).
        offsets: (B,), where each bag of an input (N,) starts: 0 first and never less than the one before, which is not
            checked. No other input has any.
        max_norm: none.
        norm_type: of `max_norm`.
        scale_grad_by_freq: divide the gradient of a row by how often it is looked up: by an example under
            `vmap(grad)`, but by all examples together where `grad` lies outside `vmap`, as with `F.embedding`.
        mode: "sum", "mean" or "max".
        sparse: the gradient is a sparse tensor.
        per_sample_weights: s, shaped as the input, for sums only.
        include_last_offset: `offsets` is (B + 1,), and the last one is where the last bag ends.
        padding_idx: an index that is left out of its bag.

    Returns:
        (B, H), zeros for a bag with nothing in it.

    Raises:
        ValueError: `max_norm` is given, which would write to the table; the mode is not known; or shapes disagree.

    Guarantees: indices from the last offset on, where it is included, are in no bag. The op puts them into the last one
        in some precisions and modes.

    Cost: the N rows. Where the input has one axis, "max" compares B copies of them.
    """
    if max_norm is not None:
        raise ValueError(
            f"embedding_bag: parameters must not be written to. Found max_norm = {max_norm}, which scales rows of the "
            "table where they lie. Leave it out and clip the rows between steps."
        )
    if mode not in ("sum", "mean", "max"):
        raise ValueError(f'embedding_bag: the mode must be "sum", "mean" or "max". Found {mode!r}.')
    if input.dim() not in (1, 2) or weight.dim() != 2:
        found = f"{tuple(input.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"embedding_bag: the input must have 1 or 2 axes and the table 2. Found {found}.")
    if (offsets is not None) != (input.dim() == 1) or (offsets is not None and offsets.dim() != 1):
        found = f"{tuple(input.shape)} with {'none' if offsets is None else tuple(offsets.shape)}"
        raise ValueError(f"embedding_bag: an input (N,) must have offsets (B,), and (B, N) none. Found {found}.")
    if per_sample_weights is not None and (mode != "sum" or per_sample_weights.shape != input.shape):
        found = f"mode {mode!r} and {tuple(per_sample_weights.shape)} for {tuple(input.shape)}"
        raise ValueError(f"embedding_bag: per_sample_weights must be of a sum, shaped as the input. Found {found}.")
    if mode == "max" and (scale_grad_by_freq or sparse):
        raise ValueError('embedding_bag: mode "max" must be without scale_grad_by_freq and sparse. Found one of them.')

    rows = F.embedding(input, weight, padding_idx, None, 2.0, scale_grad_by_freq, sparse)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    live = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        live = input != (padding_idx if padding_idx >= 0 else padding_idx + len(weight))
    if offsets is None:
        return _of_equal_bags(rows, live, mode)
    bags = len(offsets) - 1 if include_last_offset else len(offsets)
    starts = torch.zeros(len(input) + 1, dtype=torch.long, device=input.device)
    starts = starts.scatter_add(0, offsets.long(), torch.ones_like(offsets, dtype=torch.long))
    bag = starts.cumsum(0)[:-1] - 1  # (N,)
    return _of_bags(rows, live, bag, bags, mode)


def _of_equal_bags(rows: Tensor, live: Tensor, mode: str) -> Tensor:
    """(B, H) of rows (B, N, H), those that are live (B, N)."""
    if mode == "max":
        return _largest(rows, live)
    total = torch.where(live[..., None], rows, _zero(rows)).sum(-2)
    return total if mode == "sum" else total / live.sum(-1, keepdim=True).clamp(min=1)


def _of_bags(rows: Tensor, live: Tensor, bag: Tensor, bags: int, mode: str) -> Tensor:
    """(B, H) of rows (N, H), those that are live (N,), each in its bag (N,)."""
    if mode == "max":
        return _largest(rows, live & (bag == torch.arange(bags, device=bag.device)[:, None]))
    rows = torch.where(live[:, None], rows, _zero(rows))
    total = rows.new_zeros(bags + 1, rows.shape[1]).scatter_add(0, bag[:, None].expand(rows.shape), rows)[:bags]
    if mode == "sum":
        return total
    count = torch.zeros(bags + 1, dtype=torch.long, device=bag.device).scatter_add(0, bag, live.long())[:bags]
    return total / count.clamp(min=1)[:, None]


def _largest(rows: Tensor, live: Tensor) -> Tensor:
    """(B, H), the maxima of rows (N, H) or (B, N, H) over those that are live (B, N)."""
    largest = torch.where(live[..., None], rows, -math.inf).max(-2).values
    return torch.where(live.any(-1, keepdim=True), largest, _zero(rows))


def _zero(rows: Tensor) -> Tensor:
    return torch.zeros((), dtype=rows.dtype, device=rows.device)
