"""Normalisations in elementwise ops.

y = (x - mean) / √(variance + ε) · w + b    of images, by fixed statistics of each channel or those of its group
W = g v / |v|                               of a weight
"""

import torch
from torch import Tensor

from ..compiler import stored


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`. With fixed statistics by elementwise ops; else as torch does it.

    torch's own gradient of the former is wrong for one image whose cotangent is a transposed view.

    Args:
        input: (N, C, …).
        running_mean, running_var: (C,).
        weight, bias: (C,), or none.
        training: whether statistics are those of the batch.
        momentum: of the running statistics in training.
        eps: added to the variance.
    """
    if training or running_mean is None or running_var is None:
        cudnn = torch.backends.cudnn.enabled
        out: Tensor = torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn)
        return out
    shape = (-1, *[1] * (input.dim() - 2))
    y = (input - running_mean.view(shape)) * torch.rsqrt(running_var + eps).view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor:
    """`F.group_norm`, as one scale and one shift for each channel of an image.

    Sums run over space before channels, so that images are read in the order in which they are stored, whether channels
    come first or last; the compiler's own form takes several times as long where they come last. What is of a channel
    is stored, or the compiler would recompute it at each pixel, and not in vectors.

    Args:
        input: (N, C, …).
        num_groups: divides C.
        weight, bias: (C,), or none.
        eps: added to the variance.

    Raises:
        ValueError: there is one number in all, as torch says too.
    """
    n, c = input.shape[:2]
    if input.numel() == num_groups:
        raise ValueError(f"group_norm: there must be several numbers in a group. Found {tuple(input.shape)}.")
    space = list(range(2, input.dim()))
    size = input[0].numel() // num_groups

    def grouped(x: Tensor) -> Tensor:
        """(N, G, 1), the means of groups."""
        sums = stored(x.sum(space)) if space else x
        return sums.reshape(n, num_groups, -1).sum(-1, keepdim=True) / size

    def spread(x: Tensor) -> Tensor:
        """(N, C, 1, …), of each channel its group's."""
        return stored(x.expand(n, num_groups, c // num_groups).reshape(n, c)).view(n, c, *[1] * len(space))

    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    mean = grouped(wide)
    near = mean.detach()  # about any constant the variance is the same, and so are its derivatives
    variance = grouped((wide - spread(near)).square()) - (mean - near).square()
    scale = torch.rsqrt(variance + eps)
    shape = (c, *[1] * len(space))
    factor = spread(scale) if weight is None else spread(scale) * weight.view(shape)
    offset = -spread(mean) * factor
    if bias is not None:
        offset = offset + bias.view(shape)
    return (wide * factor + offset).to(input.dtype)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`: v with the norm of each slice along `dim` replaced by g; of the whole for dim -1."""
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    norms: Tensor = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return v * (g / norms)
