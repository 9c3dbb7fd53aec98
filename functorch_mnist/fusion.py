"""A word to the compiler about where to stop fusing."""

import torch
from torch import Tensor


def stored(x: Tensor) -> Tensor:
    """The same tensor, which `torch.compile` now computes once and stores with these strides.

    Otherwise it may write an expression out in full wherever it is used, and choose other strides where some size is 1.
    A view that the compiler does not see through does it; eager mode pays nothing. What it is a view of is made
    contiguous, which costs nothing where the strides are those that were traced: where an op has given others when it
    runs, the numbers would be read in another order.
    """
    if not torch.compiler.is_compiling():
        return x
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    dense = x.permute(order).clone(memory_format=torch.contiguous_format)
    return dense.as_strided(dense.shape, dense.stride()).permute([order.index(axis) for axis in range(x.dim())])
