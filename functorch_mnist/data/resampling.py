"""Images seen through affine maps, between pixels by linear interpolation; beyond an edge there is 0.

It is `affine_grid`, which has no rule for `vmap`, written out, and `grid_sample`.
"""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Line: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""a, b and c of a x + b y + c, for each image: (N,) each, in units of half an image."""


def resampled(images: Tensor, across: Line, along: Line, field: Tensor | None = None) -> Tensor:
    """Images (N, C, height, width) of which the pixel at x, y shows what was at `across`, `along`, plus a field.

    Args:
        images: float.
        across, along: where each pixel is taken from.
        field: (N, height, width, 2), added to it, in the same units.
    """
    height, width = images.shape[-2:]
    x, y = _places(width, images), _places(height, images)[:, None]
    grid = torch.stack([_at(across, x, y), _at(along, x, y)], -1)  # (N, height, width, 2)
    return F.grid_sample(images, grid if field is None else grid + field, align_corners=False)


def _places(side: int, like: Tensor) -> Tensor:
    """The centres of a row of pixels, from -1 to 1: (side,)."""
    return (2 * torch.arange(side, dtype=like.dtype, device=like.device) + 1) / side - 1


def _at(line: Line, x: Tensor, y: Tensor) -> Tensor:
    """(N, height, width)."""
    a, b, c = (factor[:, None, None] for factor in line)
    return a * x + b * y + c
