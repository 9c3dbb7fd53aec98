"""Losses of numbers: `mse`, the mean over the last axis of (output - target)²."""

from torch import Tensor

from .. import tree


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error over the last axis, per example.

    Args:
        outputs: (..., K).
        targets: (..., K).

    Returns:
        (...), float32 or wider.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> mse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        tensor(2.)
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"mse: outputs and targets must have one shape. Found {tuple(outputs.shape)} and {tuple(targets.shape)}."
        )
    return (tree.wide(outputs) - targets).square().mean(-1)
