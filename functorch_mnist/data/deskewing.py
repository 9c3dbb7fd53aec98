"""Deskewing: each image of strokes is sheared by its own moments, so by nothing that it does not show itself."""

import torch
from torch import Tensor

from .resampling import resampled


def deskewed(images: Tensor) -> Tensor:
    """Images moved so that their ink is centred, and sheared so that it does not lean.

    With the ink of an image as a distribution over pixels, of means m and covariance S: row y and column x show what
    was at row y + m_y and column x + m_x + y S_xy / S_yy, between pixels by linear interpolation. Beyond an edge there
    is 0.

    Args:
        images: (..., height, width), float, at least 0.

    Returns:
        Like `images`. Afterwards the covariance of rows and columns is about 0. A blank image stays blank.

    Raises:
        TypeError: the images are not floats.

    Guarantees: an image's result does not depend on the other images, or on its own scale, but for rounding.
    """
    if not images.is_floating_point():
        raise TypeError(f"deskewed: images must be floats. Found {images.dtype}. Divide by 255?")
    height, width = images.shape[-2:]
    flat = images.reshape(-1, height, width)
    ink = flat.sum((1, 2)).clamp(min=torch.finfo(flat.dtype).tiny)
    rows, columns = (
        torch.arange(size, dtype=flat.dtype, device=flat.device) - (size - 1) / 2 for size in (height, width)
    )
    row = (flat.sum(2) @ rows) / ink
    column = (flat.sum(1) @ columns) / ink
    down, right = rows - row[:, None], columns - column[:, None]
    variance = (flat.sum(2) * down.square()).sum(1) / ink
    covariance = torch.einsum("nij,ni,nj->n", flat, down, right) / ink
    slant = covariance / variance.clamp(min=torch.finfo(flat.dtype).eps)
    zero, one = torch.zeros_like(row), torch.ones_like(row)
    across = one, slant * height / width, 2 * column / width  # in units of half an image
    along = zero, one, 2 * row / height
    return resampled(flat[:, None], across, along).view(images.shape)
