"""The scattering transform: fixed features of images that hardly change when strokes move or bend a little.

    S₀ x = x ⋆ φ
    S₁ x = |x ⋆ ψ_{j, θ}| ⋆ φ                          0 ≤ j < J
    S₂ x = ||x ⋆ ψ_{j, θ}| ⋆ ψ_{j', θ'}| ⋆ φ          0 ≤ j < j' < J

The wavelet ψ_{j, θ} answers to oscillations of wavelength 2^j · 8/3 pixels across the angle θ; φ averages over 2^J
pixels, of which one in 2^J is kept in each direction:

    gabor_{σ, ξ, θ, s}(u) = s / (2πσ²) exp(-(r₀² + s² r₁²) / 2σ² + i ξ r₀),     r = u rotated by -θ
    ψ_{j, θ} = gabor_{σ, ξ, θ, s} - c gabor_{σ, 0, θ, s},   σ = 0.8 · 2^j, ξ = 3π/4 · 2^-j, s = 4 / L, Σ_u ψ = 0
    φ = gabor_{σ, 0, 0, 1},                            σ = 0.8 · 2^(J - 1)

Nothing here is learned, so nothing here costs privacy. Images are mirrored by 2^J pixels at each edge and convolved as
products of spectra. What is coarse is kept coarse: at scale j one pixel in 2^j, and of the later filters the
frequencies that this grid holds. The constants are those of Kymatio; its features are larger by 3e-5 per filter, for
there π is 3.1415.

Reference: Bruna, Mallat, "Invariant scattering convolution networks", IEEE PAMI 35, 2013; for the use in private
    learning, Tramèr, Boneh, "Differentially private learning needs better features (or much more data)", ICLR 2021.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import tree

_TOGETHER = 16
"""Images in one product: their intermediate results still fit a processor's cache, which is worth a factor of three."""


class Filters(NamedTuple):
    """The filters of a scattering transform for one size of image, on grids of every 2^r-th pixel, r = 0 … J - 1."""

    wavelets: tuple[Tensor, ...]
    """Per grid the spectra of the wavelets at its scale and the later ones: (J - r, L, height / 2^r, width / 2^r)."""
    rows: tuple[Tensor, ...]
    """Per grid the average over rows, and which rows are kept: (height of the features, height / 2^r)."""
    columns: tuple[Tensor, ...]
    """Per grid the same for columns."""


def scattering_filters(
    height: int, width: int, *, scale: int = 2, angles: int = 8, device: torch.device | str | None = None
) -> Filters:
    """The filters for images of this size, in float32; computed in float64.

    Args:
        height: of the images, in pixels: a multiple of 2^scale, and more than that.
        width: likewise.
        scale: J, at least 1: features are averages over 2^J pixels.
        angles: L, at least 1: how many directions a half turn is divided into.
        device: that of the images.

    Raises:
        ValueError: one of these rules is broken.

    Guarantees: the wavelets sum to 0 and the averages to 1, within 2e-5: a constant image has only the feature S₀.
    """
    if scale < 1 or angles < 1:
        raise ValueError(f"scattering_filters: scale and angles must be at least 1. Found {scale} and {angles}.")
    step = 2**scale
    if min(height, width) <= step or height % step or width % step:
        raise ValueError(
            f"scattering_filters: sides must be multiples of 2^scale = {step} and above it. Found {height} by {width}."
        )
    height, width = height + 2 * step, width + 2 * step
    scales = [torch.stack([_morlet(height, width, j, i, angles) for i in range(angles)]) for j in range(scale)]
    wavelets = torch.stack(scales)
    filters = Filters(
        tuple(_coarse(_coarse(wavelets[r:], r, -1), r, -2) for r in range(scale)),
        tuple(_average(height, scale, r) for r in range(scale)),
        tuple(_average(width, scale, r) for r in range(scale)),
    )
    moved: Filters = tree.map(lambda spectrum: spectrum.to(device=device, dtype=torch.float32), filters)
    return moved


def scattering(images: Tensor, filters: Filters) -> Tensor:
    """The scattering features of images, up to the second order.

    Args:
        images: (..., height, width), float32.
        filters: from `scattering_filters`, for this size of image.

    Returns:
        (..., 1 + J L + J (J - 1) L² / 2, height / 2^J, width / 2^J): S₀, then S₁ in the order (j, θ), then S₂ in the
        order (j, θ, j', θ'). For 28 by 28 pixels, J = 2 and L = 8: (..., 81, 7, 7).

    Raises:
        ValueError: the images have another size.
        TypeError: they are not float32.

    Guarantees: an image's features do not depend on the other images but for rounding; a multiple c ≥ 0 of an image
        has the multiple of its features; all but S₀ forget a constant added to the image; no image gives no features.

    Cost: for 28 by 28, J = 2 and L = 8, 89 Fourier transforms of 36 or 18 pixels square per image, and the memory of 16
        images.
    """
    step = 2 ** len(filters.rows)
    size = tuple(side - 2 * step for side in filters.wavelets[0].shape[-2:])
    if images.dim() < 2 or images.shape[-2:] != size:
        raise ValueError(
            f"scattering: images must be (..., {size[0]}, {size[1]}), for which the filters are. "
            f"Found {tuple(images.shape)}."
        )
    if images.dtype != torch.float32:
        raise TypeError(f"scattering: images must be float32. Found {images.dtype}. Are they pixels not yet scaled?")
    flat = images.reshape(math.prod(images.shape[:-2]), *size)
    if len(flat) == 0:  # MKL transforms no empty batch
        features = _scattering(flat.new_zeros(1, *size), filters)[:0]
    else:
        features = torch.cat([_scattering(part, filters) for part in flat.split(_TOGETHER)])
    return features.reshape(*images.shape[:-2], *features.shape[1:])


def _scattering(images: Tensor, filters: Filters) -> Tensor:
    """`scattering` of images (N, height, width), all at once."""
    scale = len(filters.rows)
    padded = F.pad(images.unsqueeze(1), (2**scale,) * 4, mode="reflect")  # (N, 1, height, width), as all below
    coefficients = torch.fft.fft2(padded, norm="forward")
    first, second = [], []
    for j in range(scale):
        envelope = _envelope(coefficients * filters.wavelets[0][j], j)  # (N, L, height / 2^j, width / 2^j)
        first.append(_averages(envelope, filters, j))
        if j + 1 < scale:
            inner = torch.fft.fft2(envelope, norm="forward").unsqueeze(-3)
            later = [
                _averages(_envelope(inner * filters.wavelets[j][k - j], k - j), filters, k) for k in range(j + 1, scale)
            ]
            second.append(torch.cat(later, -3).flatten(1, 2))  # (N, L · (J - 1 - j) · L, …)
    return torch.cat([_averages(padded, filters, 0), *first, *second], 1)


def _envelope(coefficients: Tensor, halvings: int) -> Tensor:
    """The modulus of the image with these Fourier coefficients, at every 2^halvings-th pixel: frequencies alias."""
    for dim in (-2, -1):
        for _ in range(halvings):
            low, high = coefficients.chunk(2, dim)
            coefficients = low + high
    envelope: Tensor = torch.fft.ifft2(coefficients, norm="forward").abs()
    return envelope


def _averages(image: Tensor, filters: Filters, grid: int) -> Tensor:
    """`image ⋆ φ` where it is kept: φ is a product of a function of the row and one of the column."""
    return filters.rows[grid] @ image @ filters.columns[grid].mT


def _average(side: int, scale: int, grid: int) -> Tensor:
    """The matrix (side / 2^scale - 2, side / 2^grid) of φ along one side, less the outermost pixels: the mirrored."""
    sigma = 0.8 * 2 ** (scale - 1)
    u = torch.arange(side, dtype=torch.float64) + side * torch.arange(-2.0, 3.0, dtype=torch.float64).unsqueeze(-1)
    profile = (torch.exp(-(u**2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)).sum(0)
    kernel = torch.fft.ifft(_coarse(torch.fft.fft(profile).real, grid, -1)).real
    kept = torch.arange(side // 2**scale)[1:-1] * 2 ** (scale - grid)
    rows: Tensor = kernel[(kept.unsqueeze(-1) - torch.arange(side // 2**grid)) % len(kernel)]
    return rows


def _coarse(spectrum: Tensor, halvings: int, dim: int) -> Tensor:
    """The frequencies of a spectrum that a grid of every 2^halvings-th pixel holds."""
    low = spectrum.shape[dim] // 2 ** (halvings + 1)
    high = spectrum.shape[dim] // 2**halvings - low
    length = spectrum.shape[dim]
    return torch.cat([spectrum.narrow(dim, 0, low), spectrum.narrow(dim, length - high, high)], dim)


def _morlet(height: int, width: int, j: int, i: int, angles: int) -> Tensor:
    """The spectrum of ψ_{j, θ} on a periodic grid, real as ψ(-u) is the conjugate of ψ(u): (height, width)."""
    sigma, xi, slant = 0.8 * 2**j, 0.75 * math.pi / 2**j, 4 / angles
    theta = (angles // 2 - 1 - i) * math.pi / angles
    wave = _gabor(height, width, sigma, xi, theta, slant)
    bump = _gabor(height, width, sigma, 0.0, theta, slant)
    spectrum: Tensor = torch.fft.fft2(wave - wave.sum() / bump.sum() * bump).real
    return spectrum


def _gabor(height: int, width: int, sigma: float, xi: float, theta: float, slant: float) -> Tensor:
    """A wave under a Gaussian, summed over five periods of the grid in each direction: (height, width), complex."""
    periods = torch.arange(-2.0, 3.0, dtype=torch.float64).unsqueeze(-1)
    y = (torch.arange(height, dtype=torch.float64) + height * periods)[:, None, :, None]
    x = (torch.arange(width, dtype=torch.float64) + width * periods)[None, :, None, :]
    along = y * math.cos(theta) + x * math.sin(theta)
    across = x * math.cos(theta) - y * math.sin(theta)
    bump = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2)) * slant / (2 * math.pi * sigma**2)
    return torch.polar(bump, xi * along).sum((0, 1))
