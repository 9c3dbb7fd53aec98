"""Random changes of images that leave their class, each image's drawn from its own key, in one resampling.

With u, v, r, s, h and e drawn for an image, the pixel at p (from the centre, in pixels) shows what was at

    M⁻¹ p + t + d(p),     M⁻¹ = R(rotate r) (1, shear h; 0, 1) / scale^s,     t = shift (u, v)

all of u, v, r, s, h uniform in ±1 and d a smooth field of normal numbers, between pixels by linear interpolation.
Beyond an edge there is 0. Then a rectangle may be erased.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import random
from ..hyperparameters import AT_LEAST_ZERO, check
from .resampling import resampled

_REACH = 4.0
"""Standard deviation, in pixels, of the Gaussian that smooths the elastic field."""


class Augmentation(NamedTuple):
    """How strongly images are changed. Each strength is a number or a 0-d tensor, at least 0; 0 changes nothing."""

    shift: float | Tensor = 0.0
    """The most that an image moves along an axis, in pixels."""
    rotate: float | Tensor = 0.0
    """The most that it turns, in degrees."""
    scale: float | Tensor = 0.0
    """It is enlarged by a factor between 1 / (1 + scale) and 1 + scale, uniform in the logarithm."""
    shear: float | Tensor = 0.0
    """The most that rows move, in pixels per pixel of height."""
    elastic: float | Tensor = 0.0
    """Standard deviation of each pixel's own displacement along an axis, in pixels."""
    erase: float | Tensor = 0.0
    """The largest side of an erased rectangle, as a part of the image's side; its sides are uniform up to that."""

    @property
    def moves(self) -> bool:
        """Whether images are resampled. A tensor counts as above 0."""
        return any(_on(value) for value in self[:-1])


def augmented(images: Tensor, keys: Tensor, augmentation: Augmentation) -> Tensor:
    """Images changed at random.

    Args:
        images: (*lead, C, height, width), float, background 0.
        keys: (*lead, 2), one key for each image: its channels change together.
        augmentation: how strongly.

    Returns:
        Like `images`.

    Raises:
        TypeError: the images are not floats.
        ValueError: the keys have other leading axes than the images, or a strength that is a number is below 0.

    Guarantees: an image's change depends on its key and the strengths alone. Strengths of 0 give the images themselves.
        Differentiable by strengths that are tensors, but for the erasing.

    Cost: one affine grid and one `grid_sample`; with `elastic`, 2 height width normal numbers for each image.

    Example:
        >>> dot = torch.zeros(1, 3, 3)
        >>> dot[0, 1, 1] = 1.0
        >>> turned = augmented(dot, random.key(0), Augmentation(rotate=90.0))
        >>> turned[0, 1, 1]
        tensor(1.)

    Reference: elastic fields: Simard, Steinkraus, Platt, "Best practices for convolutional neural networks applied to
        visual document analysis", ICDAR 2003; erasing: DeVries, Taylor, "Improved regularization of convolutional
        neural networks with cutout", 2017, and Zhong et al., "Random erasing data augmentation", AAAI 2020.
    """
    random.check_key("augmented", keys)
    lead = keys.shape[:-1]
    if not images.is_floating_point():
        raise TypeError(f"augmented: images must be floats. Found {images.dtype}. Divide by 255?")
    if images.shape[:-3] != lead:
        raise ValueError(
            f"augmented: images (*lead, C, height, width) and keys (*lead, 2) must share their leading axes. "
            f"Found {tuple(images.shape)} and {tuple(keys.shape)}."
        )
    check("augmented", AT_LEAST_ZERO, **augmentation._asdict())
    move_key, field_key, erase_key = random.split(keys, 3).unbind(-2)
    if augmentation.moves:
        images = _resampled(images, move_key, field_key, augmentation)
    return _erased(images, erase_key, augmentation.erase) if _on(augmentation.erase) else images


def _on(strength: float | Tensor) -> bool:
    return isinstance(strength, Tensor) or strength > 0


def _resampled(images: Tensor, move_key: Tensor, field_key: Tensor, augmentation: Augmentation) -> Tensor:
    """The images, each seen through its own affine map and elastic field."""
    height, width = images.shape[-2:]
    flat = images.reshape(-1, *images.shape[-3:])
    draws = random.uniform(move_key.reshape(-1, 2), (5,), -1.0, 1.0).to(images.dtype)
    right, down, turn, size, lean = draws.unbind(-1)  # (N,)
    angle = turn * augmentation.rotate * (math.pi / 180)
    shrunk = torch.exp(-size * _log1p(augmentation.scale))
    cos, sin, lean = torch.cos(angle) * shrunk, torch.sin(angle) * shrunk, lean * augmentation.shear
    # The map from a pixel shown to the place it is taken from, in units of half an image.
    across = cos, (cos * lean - sin) * (height / width), right * augmentation.shift * (2 / width)
    along = sin * (width / height), sin * lean + cos, down * augmentation.shift * (2 / height)
    field = None
    if _on(augmentation.elastic):
        noise = random.box_muller(field_key.reshape(-1, 2), (2, height, width)).to(images.dtype)
        rows, columns = (_smoothing(side, images) for side in (height, width))
        smooth = (rows @ noise @ columns.T).movedim(1, -1)  # (N, height, width, 2)
        sides = [torch.full((), 2 / side, dtype=images.dtype, device=images.device) for side in (width, height)]
        field = smooth * augmentation.elastic * torch.stack(sides)
    return resampled(flat, across, along, field).view(images.shape)


def _log1p(strength: float | Tensor) -> float | Tensor:
    return torch.log1p(strength) if isinstance(strength, Tensor) else math.log1p(strength)


def _smoothing(side: int, like: Tensor) -> Tensor:
    """(side, side): from white noise to smooth noise of variance 1."""
    places = torch.arange(side, dtype=like.dtype, device=like.device)
    kernel = torch.exp(-0.5 * ((places[:, None] - places) / _REACH).square())
    return kernel / kernel.square().sum(1, keepdim=True).sqrt()


def _erased(images: Tensor, key: Tensor, part: float | Tensor) -> Tensor:
    """The images with a rectangle of zeros, anywhere."""
    draws = random.uniform(key, (4,)).to(images.dtype)
    inside = torch.ones((), dtype=torch.bool, device=images.device)
    for axis, (length, place) in zip((-2, -1), (draws[..., :2].unbind(-1), draws[..., 2:].unbind(-1)), strict=True):
        side = images.shape[axis]
        half, centre = length * part * (side / 2), place * side
        places = torch.arange(side, dtype=images.dtype, device=images.device) + 0.5
        within = (places - centre[..., None]).abs() < half[..., None]  # (*lead, side)
        inside = inside & (within[..., None, :, None] if axis == -2 else within[..., None, None, :])
    return torch.where(inside, torch.zeros((), dtype=images.dtype, device=images.device), images)
