"""Image files as MNIST images: one light digit on black, 20 pixels high or wide, centred by mass in 28 x 28.

Reference: LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 86, 1998, section III.
"""

import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..options import UsageError

SIDE, DIGIT = 28, 20
_INK = 0.25
"""The part of the brightest pixel above which a pixel counts as ink when the digit is cut out."""


def read(path: Path) -> Tensor:
    """The image in a file, as a (1, 28, 28) uint8 tensor.

    A 28 x 28 image keeps its pixels; any other is cut to its digit, scaled and centred. A light background, judged by
    the border, is inverted; transparency is laid on white.

    Raises:
        UsageError: the file cannot be read as an image, or is blank.
    """
    pillow = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an image too large to be meant is an error, not a warning
            with pillow.open(path) as image:
                rgba = image.convert("RGBA")
                white = pillow.new("RGBA", rgba.size, "white")
                grey = np.asarray(pillow.alpha_composite(white, rgba).convert("L"))
    except FileNotFoundError:
        raise UsageError(f"{path} must be an image file. Found no such file.") from None
    except Exception as error:  # a damaged file fails in as many ways as there are formats
        raise UsageError(f"{path} must be an image that Pillow reads. Found: {error}.") from error
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    light = 255 - grey if np.median(border) > 127 else grey
    if light.max() == light.min():
        raise UsageError(f"{path} must show a digit. Found a blank image.")
    pixels = light if light.shape == (SIDE, SIDE) else _centred(light, pillow)
    return torch.from_numpy(pixels.copy())[None]


def _centred(light: NDArray[np.uint8], pillow: ModuleType) -> NDArray[np.uint8]:
    """The digit, cut out, scaled to 20 pixels and placed with its centre of mass at the centre."""
    ink = light > light.min() + _INK * (int(light.max()) - int(light.min()))
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    digit = light[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = DIGIT / max(digit.shape)
    size = tuple(max(1, round(scale * length)) for length in digit.shape[::-1])  # Pillow counts width first
    small = np.asarray(pillow.fromarray(digit).resize(size, pillow.Resampling.LANCZOS)).astype(np.int32)
    small = np.clip(small - int(light.min()), 0, 255)
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (
        _offset(small.sum(axis), axis_length) for axis, axis_length in ((1, small.shape[0]), (0, small.shape[1]))
    )
    canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
    return canvas


def _offset(mass: NDArray[np.int64], length: int) -> int:
    """Where a digit starts on an axis so that its centre of mass is the canvas's, as far as it fits."""
    centre = float((mass * np.arange(length)).sum() / mass.sum())
    return int(np.clip(round((SIDE - 1) / 2 - centre), 0, SIDE - length))


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            f"Image files need Pillow. Importing it failed: {error}. Install it: pip install pillow."
        ) from error
    return Image
