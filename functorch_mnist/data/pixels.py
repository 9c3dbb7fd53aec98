"""Pixels as a network takes them, and the statistics that takes."""

import math

import torch
from torch import Tensor


def normalization(images: Tensor) -> tuple[float, float]:
    """The mean and standard deviation of all pixels / 255, each rounded to 4 decimals.

    Args:
        images: uint8, any shape; at least one pixel.

    Returns:
        Mean in 0..1, and standard deviation (divisor N) in 0..0.5: what `(pixels / 255 - mean) / deviation` needs.

    Raises:
        TypeError: the dtype is not uint8.
        ValueError: there is no pixel, or the deviation is 0 to 4 decimals, so that nothing can be divided by it.

    Guarantees: computed from a histogram in exact integers; no rounding error grows with the number of pixels.

    Example:
        >>> normalization(torch.tensor([0, 255, 255, 255], dtype=torch.uint8))
        (0.75, 0.433)
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"data.normalization: images must be uint8. Found {images.dtype}. Are they scaled already?")
    counts = torch.bincount(images.reshape(-1), minlength=256).tolist()
    n = sum(counts)
    if n == 0:
        raise ValueError("data.normalization: there must be a pixel. Found none. Is a split empty?")
    total = sum(value * count for value, count in enumerate(counts))
    squares = sum(value**2 * count for value, count in enumerate(counts))
    mean = round(total / (255 * n), 4)
    deviation = round(math.sqrt((n * squares - total**2) / (255 * n) ** 2), 4)
    if deviation == 0:
        raise ValueError(
            "data.normalization: pixels must differ. Found a standard deviation of 0. Are the images blank?"
        )
    return mean, deviation


def normalize(images: Tensor, mean: float, deviation: float) -> Tensor:
    """`(pixels / 255 - mean) / deviation`, in float32.

    Args:
        images: uint8, any shape.
        mean: of pixels / 255, as `normalization` gives it.
        deviation: above 0, likewise.

    Example:
        >>> normalize(torch.tensor([0, 255], dtype=torch.uint8), 0.5, 0.5)
        tensor([-1.,  1.])
    """
    return images.float().div(255).sub(mean).div(deviation)
