"""Image files as MNIST images: one light digit on black, 20 pixels high or wide, centred by mass in 28 x 28.

Reference: LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 86, 1998, section III.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from .. import files
from ..options import UsageError

SIDE, DIGIT, ZOOM = 28, 20, 10
_INK = 0.25
"""The fraction of the brightest pixel above which a pixel counts as ink when the digit is cut out."""


def read(path: Path) -> Tensor:
    """The image in a file, as a (1, 28, 28) uint8 tensor.

    A 28 x 28 image keeps its pixels; any other is cut to its digit, scaled and centred. A light background, judged by
    the border, is inverted; transparency is laid on white, or on black where only a light digit is opaque. Of several
    frames it is the first.

    Raises:
        UsageError: the file cannot be read as an image, or is blank.
    """
    if not path.is_file():
        raise UsageError(f"{path} must be an image file. Found no file there.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # too large to be meant
            with Image.open(path) as image:
                grey = _brightness(ImageOps.exif_transpose(image))
    except Exception as error:  # a damaged file fails in as many ways as there are formats
        found = str(error).rstrip(" .")
        raise UsageError(f"{path} must be an image that Pillow reads. Found: {found}.") from error
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    light = 255 - grey if np.median(border) > 127 else grey
    pixels = light if light.shape == (SIDE, SIDE) or not np.ptp(light) else _centred(light)
    if not np.ptp(pixels):
        raise UsageError(f"{path} must show a digit. Found a blank image.")
    return torch.from_numpy(pixels.copy())[None]


def save(path: Path, image: Tensor) -> None:
    """Writes an image (1, 28, 28) of pixels from 0 to 255 as a PNG file, enlarged.

    Raises:
        OSError: it cannot be written.
    """
    pixels = Image.fromarray(image[0].round().clamp(0, 255).to("cpu", torch.uint8).numpy())
    picture = io.BytesIO()
    pixels.resize((ZOOM * SIDE, ZOOM * SIDE), Image.Resampling.NEAREST).save(picture, "PNG")
    files.write(path, picture.getvalue())


def _brightness(image: Any) -> NDArray[np.uint8]:
    """What an image of any mode looks like in grey, (height, width)."""
    if image.mode.startswith(("I", "F")):  # more than 8 bits, and nothing says which value is white
        values = np.asarray(image, np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        return _stretched(values, values.min(), values.max())
    if not image.has_transparency_data:
        return np.asarray(image.convert("L"))
    grey, opacity = (np.asarray(band, np.float64) for band in image.convert("RGBA").convert("LA").split())
    light_digit = opacity.mean() < 127 and (grey * opacity).sum() > 127 * opacity.sum()
    paper = 0 if light_digit else 255
    return (paper + (grey - paper) * opacity / 255).round().astype(np.uint8)


def _centred(light: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The digit, cut out, scaled to 20 pixels and placed with its centre of mass at the centre."""
    low, high = int(light.min()), int(light.max())
    ink = light > low + _INK * (high - low)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    digit = light[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = DIGIT / max(digit.shape)
    width, height = (max(1, round(scale * length)) for length in digit.shape[::-1])
    resized = Image.fromarray(digit).resize((width, height), Image.Resampling.LANCZOS)
    small = _stretched(np.asarray(resized, np.float64), low, high)
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    top, left = _offset(small.sum(1)), _offset(small.sum(0))
    canvas[top : top + height, left : left + width] = small
    return canvas


def _stretched(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    """The values with `low` as 0 and `high` as 255."""
    return (255 * ((values - low) / max(high - low, 1e-300)).clip(0, 1)).round().astype(np.uint8)


def _offset(mass: NDArray[Any]) -> int:
    """Where a digit starts on an axis so that its centre of mass is at pixel 14, as MNIST has it, as far as it fits."""
    centre = float((mass * np.arange(len(mass))).sum() / max(mass.sum(), 1))
    return int(np.clip(round(SIDE / 2 - centre), 0, SIDE - len(mass)))
