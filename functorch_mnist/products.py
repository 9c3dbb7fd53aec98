"""Products of matrices in float32 on a CPU, by the faster of the two libraries that torch has for them.

torch gives products to MKL, which has kernels for Intel's CPUs and takes about twice as long as it could on others, and
convolutions to oneDNN, which has kernels for all. A product `x Wᵀ` is a convolution with a kernel of one pixel: the
rows of x are the pixels of one image, stored channels last. So both are the same numbers in the same order.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from . import machine, native
from .compiler import constant_to_the_compiler

_WORTH = 2**21
"""Multiplications: fewer take less time than a convolution's call."""
_ROWS = 128
"""Fewer take less time than to reorder the kernel: some dozen multiplications take as long as moving a number."""

_DENSE = 64
"""Multiplications for each number of a row, inputs and outputs: with fewer, moving the rows takes the time."""


@constant_to_the_compiler
def prefers_convolutions() -> bool:
    """Whether torch has oneDNN next to an MKL that was not written for this CPU."""
    return _mkl_is_foreign()


@functools.cache
def _mkl_is_foreign() -> bool:
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and "Intel" not in machine.vendor()


def _by_convolution(rows: int, inputs: int, outputs: int, x: Tensor, y: Tensor) -> bool:
    """Whether a product of `x` and `y`, of that many rows with a matrix, is taken as a convolution."""
    if not x.dtype == y.dtype == torch.float32 or x.device.type != "cpu" or y.device.type != "cpu":
        return False
    worth = rows * inputs * outputs >= _WORTH and inputs * outputs >= _DENSE * (inputs + outputs)
    return rows >= _ROWS and worth and prefers_convolutions()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: `x Wᵀ + b`, (…, H) of (…, D) and (H, D)."""
    rows = math.prod(input.shape[:-1])
    own = weight.dim() != 2 or native.is_of_an_example(weight)  # a matrix for each example: products of a batch
    outputs, inputs = (0, 0) if own else weight.shape
    if not _by_convolution(rows, inputs, outputs, input, weight):
        return F.linear(input, weight, bias)
    out = F.conv2d(_image(input), weight[..., None, None], bias)
    return out.movedim(1, -1).reshape(*input.shape[:-1], len(weight))


def sum_of_outer(x: Tensor, y: Tensor) -> Tensor:
    """`xᵀ y`, (H, D) of (N, H) and (N, D): a sum of outer products, as the gradient of a weight is."""
    if not _by_convolution(len(x), x.shape[1], y.shape[1], x, y):
        return x.T @ y
    weight: Tensor = conv2d_weight(_image(y), (x.shape[1], y.shape[1], 1, 1), _image(x))
    return weight[..., 0, 0]


def _image(x: Tensor) -> Tensor:
    """The rows of (…, D) as the pixels of one image (1, D, N, 1), stored channels last."""
    return x.reshape(1, math.prod(x.shape[:-1]), 1, x.shape[-1]).movedim(-1, 1)
