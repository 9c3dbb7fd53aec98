"""Random changes of images that leave their class, each drawn from a key."""

import torch
from torch import Tensor

from .. import random


def shifted(images: Tensor, keys: Tensor, *, pixels: int) -> Tensor:
    """Images moved by whole pixels, up to `pixels` in each direction; what comes in at an edge is zero.

    Args:
        images: (..., height, width).
        keys: (*lead, 2), one key for each of the leading axes of `images`: all the rest of an image moves together.
        pixels: the most that an image moves along an axis, at least 0.

    Returns:
        Like `images`.

    Raises:
        ValueError: `pixels` is negative, or the keys have other leading axes than the images.

    Guarantees: an image's move depends on its key alone; all (2 pixels + 1)² moves are equally likely.

    Example:
        >>> shifted(torch.ones(1, 2), random.key(1), pixels=0)
        tensor([[1., 1.]])
    """
    lead = keys.shape[:-1]
    if pixels < 0:
        raise ValueError(f"shifted: pixels must be at least 0. Found {pixels}.")
    if images.dim() < len(lead) + 2 or images.shape[: len(lead)] != lead:
        raise ValueError(
            f"shifted: images (..., height, width) must begin with the leading axes of the keys. "
            f"Found {tuple(images.shape)} and {tuple(keys.shape)}."
        )
    if pixels == 0:
        return images
    moves = random.randint(keys, (2,), -pixels, pixels + 1)
    rest = [1] * (images.dim() - len(lead) - 2)
    for axis in (-2, -1):
        size = images.shape[axis]
        source = torch.arange(size, device=images.device) - moves[..., 2 + axis, None]  # (*lead, size)
        shape = (*lead, *rest, size, 1) if axis == -2 else (*lead, *rest, 1, size)
        index = source.clamp(0, size - 1).long().view(shape).expand(images.shape)
        inside = ((source >= 0) & (source < size)).view(shape)
        zero = torch.zeros((), dtype=images.dtype, device=images.device)
        images = torch.where(inside, images.gather(axis, index), zero)
    return images
