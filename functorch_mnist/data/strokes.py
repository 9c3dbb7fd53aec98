"""Random glyphs: images of pen strokes that stand for no writing, in classes of hands that write the same glyph.

    stroke(t) = Σ_i B_{i,4}(t) p_i,   t ∈ {0, 1/39, …, 1}          B_{i,4}: Bernstein polynomials of degree 4
    p_i of a hand = A (p_i of the glyph + 0.09 z_i),   A = I + 0.12 Z,   z, Z ~ N(0, 1)
    image(u) = clip(w + 1/2 - min over strokes and t of |u - stroke(t)|, 0, 1)

A glyph has one, two or three strokes with chances 0.5, 0.35 and 0.15; a later one begins where the one before ends with
chance 0.6. Control points are uniform in a box 1.5 wide and 2 high, those after the first of a stroke in 0.8 of it. The
curves are scaled to 18 pixels on their longer side and centred. Half the pen's width is w = 1.2 + 0.35 z + 0.2 z', the
first of the glyph and the second of the hand, from 0.6 to 2.2 pixels.

No image of a data set enters, so what is learned from glyphs costs no privacy.

Reference: for learning from what random processes draw Tang, Panda, Sehwag, Mittal, "Differentially private image
    classification by learning priors from random processes", NeurIPS 2023, arXiv 2306.06076.
"""

import math

import torch
from torch import Tensor

from .. import random

_STROKES, _CONTROLS, _POINTS = 3, 5, 40
_TOGETHER = 250
"""Images drawn at once: 80 MB of distances."""


def glyphs(key: Tensor, classes: int, hands: int, *, size: int = 28) -> Tensor:
    """Images of random glyphs.

    Args:
        key: (2,).
        classes: how many glyphs, at least 1.
        hands: how many images of each, at least 1.
        size: height and width of an image in pixels, at least 20, which leaves a margin of one about the curve.

    Returns:
        (classes, hands, size, size), float32 in [0, 1].

    Raises:
        ValueError: a number is out of its range.

    Guarantees: the same key gives the same glyphs.

    Cost: 120 size² distances per image.

    Example:
        >>> glyphs(random.key(0), 3, 2).shape
        torch.Size([3, 2, 28, 28])
    """
    if classes < 1 or hands < 1 or size < 20:
        raise ValueError(
            f"glyphs: classes and hands must be at least 1, size at least 20. Found {classes}, {hands} and {size}."
        )
    curves, drawn = _curves(key, classes, hands)
    widths = _widths(random.fold_in(key, 1), classes, hands)
    parts = zip(curves.flatten(0, 1).split(_TOGETHER), drawn.flatten(0, 1).split(_TOGETHER), strict=True)
    distances = torch.cat([_distances(curve, strokes, size) for curve, strokes in parts])
    return (widths[..., None, None] + 0.5 - distances.view(classes, hands, size, size)).clamp(0, 1)


def _curves(key: Tensor, classes: int, hands: int) -> tuple[Tensor, Tensor]:
    """Points of strokes in pixels from the centre, and which strokes there are: (K, V, S, T, 2) and (K, V, S)."""
    place, count, joined, moved, affine = random.split(key, 5)
    device = key.device
    box = torch.tensor([0.75, 1.0], device=device)
    controls = random.uniform(place, (classes, _STROKES, _CONTROLS, 2), -1, 1) * box
    controls = torch.cat([controls[:, :, :1], 0.8 * controls[:, :, 1:]], 2)
    joins = random.bernoulli(joined, 0.6, (classes, _STROKES, 1))
    starts = [controls[:, 0, 0]]
    starts += [torch.where(joins[:, s], controls[:, s - 1, -1], controls[:, s, 0]) for s in range(1, _STROKES)]
    controls = torch.cat([torch.stack(starts, 1).unsqueeze(2), controls[:, :, 1:]], 2)
    controls = controls.unsqueeze(1) + 0.09 * random.normal(moved, (classes, hands, *controls.shape[1:]))
    maps = torch.eye(2, device=device) + 0.12 * random.normal(affine, (classes, hands, 1, 2, 2))
    t = torch.linspace(0, 1, _POINTS, device=device)
    degree = _CONTROLS - 1
    bernstein = torch.stack([math.comb(degree, i) * t**i * (1 - t) ** (degree - i) for i in range(_CONTROLS)], 1)
    curves = bernstein @ (controls @ maps)  # (K, V, S, T, 2)
    strokes = 1 + (random.uniform(count, (classes, 1, 1)) > torch.tensor([0.5, 0.85], device=device)).sum(-1)
    drawn = torch.arange(_STROKES, device=device) < strokes[..., None]  # (K, 1, S)
    kept = drawn[..., None, None]
    high = curves.masked_fill(~kept, -torch.inf).amax((2, 3), keepdim=True)
    low = curves.masked_fill(~kept, torch.inf).amin((2, 3), keepdim=True)
    scale = 18 / (high - low).amax(-1, keepdim=True).clamp(min=0.1)
    return (curves - (high + low) / 2) * scale, drawn.expand(classes, hands, _STROKES)


def _widths(key: Tensor, classes: int, hands: int) -> Tensor:
    """Half the width of each pen: (K, V)."""
    of_glyph, of_hand = random.split(key)
    widths = 1.2 + 0.35 * random.normal(of_glyph, (classes, 1)) + 0.2 * random.normal(of_hand, (classes, hands))
    return widths.clamp(0.6, 2.2)


def _distances(curves: Tensor, drawn: Tensor, size: int) -> Tensor:
    """From each pixel to the nearest point of a stroke that is drawn: (N, size, size) of (N, S, T, 2) and (N, S)."""
    axis = torch.arange(size, dtype=curves.dtype, device=curves.device) - (size - 1) / 2
    across = (curves[..., 0, None] - axis).square()  # (N, S, T, size)
    down = (curves[..., 1, None] - axis).square()
    nearest = (down.unsqueeze(-1) + across.unsqueeze(-2)).amin(2)  # (N, S, size, size)
    return nearest.masked_fill(~drawn[..., None, None], torch.inf).amin(1).sqrt()
