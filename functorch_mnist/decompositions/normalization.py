"""Normalisations in elementwise ops.

y = (x - mean) / √(variance + ε) · w + b    of images, by fixed statistics of each channel
W = g v / |v|                               of a weight
"""

import torch
from torch import Tensor


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


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`: v with the norm of each slice along `dim` replaced by g; of the whole for dim -1."""
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    norms: Tensor = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return v * (g / norms)
