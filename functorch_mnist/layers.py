"""Layers: pure functions of inputs and weights, for one example or a batch with any leading axes.

    linear             y = x Wᵀ + b
    group_norm         (x - mean) / √(variance + ε), over groups of channels
    relu               max(x, 0)
    sigmoid            1 / (1 + e⁻ˣ)
    tanh               (eˣ - e⁻ˣ) / (eˣ + e⁻ˣ)
    log_softmax        x - log Σ_k e^{x_k}
    dropout            x m / (1 - rate),  m ~ Bernoulli(1 - rate)

Randomness is an argument: a dropout layer takes one key per example, so an example's mask does not depend on the batch
it is in. Shapes below write `...` for the leading axes.

Images are fastest on a CPU in the channels-last memory format. A layer keeps the format of its input; `flatten` and
`max_pool2d` also keep it in their gradients, which torch's own do not.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import products, random
from .compiler import stored
from .decompositions import fastest

__all__ = [
    "ACTIVATIONS",
    "channel_dropout",
    "channels_last",
    "conv2d",
    "dropout",
    "flatten",
    "group_norm",
    "image_linear",
    "linear",
    "log_softmax",
    "max_pool2d",
    "relu",
    "sigmoid",
    "tanh",
    "tempered_sigmoid",
]


def __dir__() -> list[str]:
    return __all__


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b`.

    Args:
        x: (..., D).
        weight: (H, D).
        bias: (H,), or none.

    Returns:
        (..., H).

    Example:
        >>> linear(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([0.5]))
        tensor([3.5000])
    """
    _check_input("linear", x, weight)
    if x.shape[-1:] != weight.shape[-1:]:
        raise ValueError(
            f"linear: x (..., D) and weight (H, D) must agree in D. Found {tuple(x.shape)} and {tuple(weight.shape)}. "
            "Flatten images first?"
        )
    return products.linear(x, weight, bias)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0) -> Tensor:
    """The cross-correlation of images with kernels: `y[o, i, j] = b[o] + Σ_{c, u, v} w[o, c, u, v] x[c, i + u, j + v]`.

    Args:
        x: (..., C, height, width).
        weight: (O, C, kernel height, kernel width).
        bias: (O,), or none.
        stride: step of the kernel, in pixels.
        padding: zeros added at each edge, in pixels.

    Returns:
        (..., O, height', width').
    """
    _check_input("conv2d", x, weight)
    if x.dim() < 3 or x.shape[-3] != weight.shape[-3]:
        raise ValueError(
            f"conv2d: x (..., C, height, width) and weight (O, C, ...) must agree in C. Found {tuple(x.shape)} and "
            f"{tuple(weight.shape)}. Is the axis of channels missing? x[:, None] adds it."
        )
    if torch.compiler.is_compiling() or (weight.shape[-3] == 1 and x.dim() == 3):
        weight = channels_last(weight)  # `vmap` forgets how one channel is stored, and torch asks the weight as well
    return _over_leading_axes(lambda images: F.conv2d(images, weight, bias, stride, padding), x)


def max_pool2d(x: Tensor, size: int = 2, *, stride: int | None = None) -> Tensor:
    """The maximum over windows; rows and columns that fill no window are left out.

    Args:
        x: (..., C, height, width).
        size: height and width of a window, in pixels.
        stride: from one window to the next, in pixels; by default the size, so that windows do not overlap.

    Returns:
        (..., C, (height - size) // stride + 1, (width - size) // stride + 1).

    Guarantees: NaN in a window gives NaN; where values tie, the first in row order gets the gradient, as in torch.
    """
    stride = size if stride is None else stride
    if size == 2 and stride <= 2 and torch.compiler.is_compiling():
        return _max_pool2d_by_comparison(x, stride)
    return _over_leading_axes(lambda images: F.max_pool2d(images, size, stride), x)


def _check_input(where: str, x: Tensor, weight: Tensor) -> None:
    """Raises TypeError for dtypes that torch cannot combine, under autocast or not."""
    if x.dtype == weight.dtype:
        return
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        raise TypeError(
            f"{where}: x must be floats. Found {x.dtype}. Divide pixels by 255, or use data.normalize, which does."
        )
    if torch.float64 in (x.dtype, weight.dtype):
        raise TypeError(
            f"{where}: x and weight must have one dtype. Found {x.dtype} and {weight.dtype}. Use x.float()?"
        )


def _max_pool2d_by_comparison(x: Tensor, stride: int) -> Tensor:
    """`max_pool2d` of two by two pixels by comparisons.

    The compiler fuses them, where it would scatter torch's gradients. Which pixel of a window is the largest is stored,
    so that the gradients of all four are written at once.
    """
    if stride == 1:
        x = torch.where(_follows(x[..., :-1], x[..., 1:]), x[..., 1:], x[..., :-1])
        return torch.where(_follows(x[..., :-1, :], x[..., 1:, :]), x[..., 1:, :], x[..., :-1, :])
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    x = x[..., : 2 * height, : 2 * width].movedim(-3, -1)
    windows = x.view(*x.shape[:-3], height, 2, width, 2, x.shape[-1])
    left, right = windows.unbind(-2)
    is_right = _follows(left, right)
    top, bottom = torch.where(is_right, right, left).unbind(-3)
    is_bottom = _follows(top, bottom)
    top_right, bottom_right = is_right.unbind(-3)
    number = is_bottom.float() * 2 + torch.where(is_bottom, bottom_right, top_right).float()
    numbers = torch.arange(4.0, device=x.device).view(2, 1, 2, 1)
    largest = stored(number.contiguous())[..., None, :, None, :] == numbers
    return torch.where(largest, windows, 0.0).sum((-4, -2)).movedim(-1, -3)


def _follows(a: Tensor, b: Tensor) -> Tensor:
    """Whether b is the maximum of both and a is not."""
    return (b > a) | (b != b)  # a NaN is not itself; isnan would not be vectorised


def _over_leading_axes(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`fn` of images (C, height, width) or (N, C, height, width), extended to any leading axes."""
    if x.dim() <= 4:
        return fn(x)
    images: Tensor = fn(x.flatten(0, -4)).unflatten(0, x.shape[:-3])
    return images


def channels_last(x: Tensor) -> Tensor:
    """The same images, stored channels last: the format in which convolutions are fastest on a CPU.

    Args:
        x: (..., C, height, width).

    Returns:
        (..., C, height, width), equal to `x`; a copy only where there are several channels stored first.
    """
    if x.shape[-3] == 1:  # both orders hold the same numbers: only the strides tell them apart
        return stored(x.squeeze(-3).unsqueeze(-1).movedim(-1, -3))  # else the compiler would choose the strides
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def flatten(x: Tensor) -> Tensor:
    """Each image as one vector, in the order channel, row, column.

    Args:
        x: (..., C, height, width).

    Returns:
        (..., C · height · width).
    """
    # The gradient of `narrow` is a new tensor in the order of the narrowed one: channels last. Without it the gradient
    # would reach the layers below as a strided view, and each of them would copy it.
    last = x.movedim(-3, -1)
    if torch.compiler.is_compiling():  # stored as it is computed, and then reordered: two fast kernels for a slow one
        return stored(last.contiguous()).movedim(-1, -3).flatten(-3)
    return last.narrow(-1, 0, last.shape[-1]).movedim(-1, -3).flatten(-3)


def image_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of whole images: `linear(flatten(x), weight, bias)`.

    Args:
        x: (..., C, height, width).
        weight: (H, C · height · width).
        bias: (H,), or none.

    Returns:
        (..., H).

    Cost: one matrix product; where torch's products are slow, a convolution whose kernel covers the image, which needs
        no other order of the images' numbers, but of the kernel's.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and products.prefers_convolutions():
        kernel = weight.unflatten(-1, x.shape[-3:])
        return conv2d(x, kernel, bias).flatten(-3)
    return linear(flatten(x), weight, bias)


def relu(x: Tensor) -> Tensor:
    """`max(x, 0)`, with gradient 0 at 0."""
    return torch.relu(x)


def sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + e⁻ˣ)`."""
    return torch.sigmoid(x)


def tanh(x: Tensor) -> Tensor:
    """`(eˣ - e⁻ˣ) / (eˣ + e⁻ˣ)`."""
    return torch.tanh(x)


def tempered_sigmoid(x: Tensor, *, scale: float = 2.0, temperature: float = 2.0, offset: float = 1.0) -> Tensor:
    """`scale / (1 + e^(-temperature x)) - offset`, by default the hyperbolic tangent.

    Args:
        x: any shape.
        scale, temperature, offset: numbers of the formula.

    Returns:
        Like `x`.

    Reference: Papernot, Thakurta, Song, Chien, Erlingsson, "Tempered sigmoid activations for deep learning with
        differential privacy", AAAI 2021, equation 1; there the temperature is named its inverse.
    """
    return scale * torch.sigmoid(temperature * x) - offset


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"relu": relu, "sigmoid": sigmoid, "tanh": tanh}
)
"""The activations by name."""


def group_norm(x: Tensor, groups: int, *, epsilon: float = 1e-5) -> Tensor:
    """Each group of channels with mean 0 and variance 1: `(x - mean) / √(variance + epsilon)`.

    Args:
        x: (..., C, height, width).
        groups: how many groups of equal size the channels are divided into; it divides C.
        epsilon: above 0.

    Returns:
        Like `x`.

    Raises:
        ValueError: the groups do not divide the channels.

    Guarantees: an example's result does not depend on the other examples of the batch.

    Reference: Wu, He, "Group normalization", ECCV 2018, equation 1.
    """
    if groups < 1 or x.shape[-3] % groups:
        raise ValueError(f"group_norm: groups must divide the channels, {x.shape[-3]}. Found {groups}.")
    images = x.flatten(0, -4) if x.dim() > 3 else x[None]
    normalized: Tensor = fastest(F.group_norm)(images, groups, eps=epsilon)
    return normalized.view(x.shape)


def log_softmax(x: Tensor) -> Tensor:
    """Log-probabilities over the last axis: `x - log Σ_k e^{x_k}`.

    Example:
        >>> log_softmax(torch.zeros(2)).exp()
        tensor([0.5000, 0.5000])
    """
    return F.log_softmax(x, dim=-1)


def dropout(x: Tensor, key: Tensor, *, rate: float | Tensor) -> Tensor:
    """`x` with each number set to zero with probability `rate`, the others divided by `1 - rate`.

    Args:
        x: (..., *shape).
        key: (..., 2), one key per example.
        rate: in [0, 1), a number or a 0-d tensor, whose value is not checked.

    Returns:
        (..., *shape).

    Guarantees: the expectation is `x`; `rate` 0 gives `x`; an example's mask depends on its key alone.

    Reference: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15, 2014.
    """
    random.check_key("dropout", key)
    return drop(x, key, x.shape[key.dim() - 1 :], rate=rate)


def channel_dropout(x: Tensor, key: Tensor, *, rate: float | Tensor) -> Tensor:
    """`dropout` of whole channels.

    Args:
        x: (..., C, height, width).
        key: (..., 2), one key per example.
        rate: in [0, 1), a number or a 0-d tensor, whose value is not checked.

    Returns:
        (..., C, height, width).

    Reference: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015.
    """
    random.check_key("channel_dropout", key)
    return drop(x, key, (x.shape[-3], 1, 1), rate=rate)


def drop(x: Tensor, key: Tensor, shape: tuple[int, ...], *, rate: float | Tensor) -> Tensor:
    """`x` (..., *) under a dropout mask of shape (..., *shape) that broadcasts against it; `key` is (..., 2)."""
    if not isinstance(rate, Tensor) and not 0 <= rate < 1:
        raise ValueError(f"dropout: rate must be in [0, 1). Found {rate}.")
    if key.shape[:-1] != x.shape[: key.dim() - 1]:
        raise ValueError(
            f"dropout: keys (..., 2) must share their leading axes with x. "
            f"Found {tuple(key.shape)} and {tuple(x.shape)}."
        )
    if not isinstance(rate, Tensor) and rate == 0:
        return x
    keep = random.bernoulli(key, 1 - rate, shape)
    return torch.where(keep, x / (1 - rate), torch.zeros((), dtype=x.dtype, device=x.device))
